// The one name of IOSurface that metal-cpp's headers use.
#pragma once
typedef struct __IOSurface* IOSurfaceRef;
