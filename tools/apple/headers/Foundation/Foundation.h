// Names of Foundation that PyTorch's MPS headers use, declared and no more.
#pragma once
#include <objc/objc.h>
@class NSArray;
@class NSDictionary;
@class NSString;
