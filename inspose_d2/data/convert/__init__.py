"""Files of annotation tools made into COCO keypoint files, and into YOLO's: one module a format.

Each reads what its tool writes, repairs what can be repaired, and counts it. Coordinates are taken
over as the tools write them, in pixels from the corner of the image.
"""
