// The two names of CoreFoundation that metal-cpp's headers use.
#pragma once
typedef double CFTimeInterval;
typedef double CFAbsoluteTime;
