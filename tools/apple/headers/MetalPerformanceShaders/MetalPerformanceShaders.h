// The one name of MetalPerformanceShaders that PyTorch's MPSStream.h uses.
#pragma once
@class MPSCommandBuffer;
