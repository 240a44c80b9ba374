// Names of MetalPerformanceShadersGraph that PyTorch's MPSStream.h uses.
#pragma once
@class MPSGraph;
@class MPSGraphCompilationDescriptor;
@class MPSGraphExecutionDescriptor;
