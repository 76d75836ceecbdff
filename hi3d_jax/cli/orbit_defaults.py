"""The orbit that cameras.py describes by default, spelled out: `hi3d --help` starts without numpy.

A test holds the two equal.
"""

ORBIT_RADIUS = 1.5
ORBIT_FOV_DEG = 49.13434264120263
ORBIT_NUM_VIEWS = 16
