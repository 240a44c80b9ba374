// Names of Metal that PyTorch's MPS headers use, declared and no more: our sources call Metal through metal-cpp.
#pragma once
#include <Foundation/Foundation.h>
#include <dispatch/dispatch.h>
@protocol MTLBuffer;
@protocol MTLCommandBuffer;
@protocol MTLCommandQueue;
@protocol MTLComputeCommandEncoder;
@protocol MTLDevice;
@protocol MTLSharedEvent;
typedef void (^MTLCommandBufferHandler)(id<MTLCommandBuffer>);
