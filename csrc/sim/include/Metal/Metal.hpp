// The part of metal-cpp's Metal that the core uses, for machines without Metal.
//
// Names, signatures and ownership are metal-cpp's (see Foundation.hpp; tests/test_metal_cpp.py compares them).
// Differences, all of them where Apple's headers need blocks: a deallocator is a std::function, and completion handlers
// have the std::function form only (pass an MTL::HandlerFunction: with a bare lambda Apple's overloads are ambiguous).
//
// What Metal's API validation would abort on throws std::logic_error from the offending call.
#pragma once

#include "Foundation/Foundation.hpp"

#include <functional>

using CFTimeInterval = double;

namespace MTL {

class Buffer;
class CommandBuffer;
class CommandQueue;
class ComputeCommandEncoder;
class ComputePassDescriptor;
class ComputePassSampleBufferAttachmentDescriptor;
class ComputePassSampleBufferAttachmentDescriptorArray;
class ComputePipelineDescriptor;
class ComputePipelineReflection;
class ComputePipelineState;
class CounterSampleBuffer;
class CounterSampleBufferDescriptor;
class CounterSet;
class Device;
class Event;
class Function;
class FunctionConstantValues;
class Library;
class SharedEvent;

struct Size {
  Size() = default;
  Size(NS::UInteger width, NS::UInteger height, NS::UInteger depth) : width(width), height(height), depth(depth) {}
  static Size Make(NS::UInteger width, NS::UInteger height, NS::UInteger depth) { return {width, height, depth}; }

  NS::UInteger width;
  NS::UInteger height;
  NS::UInteger depth;
};

enum StorageMode : NS::UInteger {
  StorageModeShared = 0,
  StorageModeManaged = 1,
  StorageModePrivate = 2,
  StorageModeMemoryless = 3,
};

using ResourceOptions = NS::UInteger;
enum : ResourceOptions {
  ResourceCPUCacheModeDefaultCache = 0,
  ResourceCPUCacheModeWriteCombined = 1,
  ResourceStorageModeShared = 0,
  ResourceStorageModeManaged = 1 << 4,
  ResourceStorageModePrivate = 1 << 5,
  ResourceHazardTrackingModeDefault = 0,
  ResourceHazardTrackingModeUntracked = 1 << 8,
  ResourceHazardTrackingModeTracked = 1 << 9,
};

enum CommandBufferStatus : NS::UInteger {
  CommandBufferStatusNotEnqueued = 0,
  CommandBufferStatusEnqueued = 1,
  CommandBufferStatusCommitted = 2,
  CommandBufferStatusScheduled = 3,
  CommandBufferStatusCompleted = 4,
  CommandBufferStatusError = 5,
};

enum CommandBufferError : NS::UInteger {
  CommandBufferErrorNone = 0,
  CommandBufferErrorInternal = 1,
  CommandBufferErrorTimeout = 2,
  CommandBufferErrorPageFault = 3,
  CommandBufferErrorNotPermitted = 7,
  CommandBufferErrorOutOfMemory = 8,
  CommandBufferErrorInvalidResource = 9,
};

enum LibraryError : NS::UInteger {
  LibraryErrorUnsupported = 1,
  LibraryErrorInternal = 2,
  LibraryErrorCompileFailure = 3,
  LibraryErrorCompileWarning = 4,
  LibraryErrorFunctionNotFound = 5,
  LibraryErrorFileNotFound = 6,
};

/// Those of function constants.
enum DataType : NS::UInteger {
  DataTypeFloat = 3,
  DataTypeInt = 29,
  DataTypeUInt = 33,
  DataTypeShort = 37,
  DataTypeUShort = 41,
  DataTypeChar = 45,
  DataTypeUChar = 49,
  DataTypeBool = 53,
};

using PipelineOption = NS::UInteger;
enum : PipelineOption { PipelineOptionNone = 0 };

/// The stand-in runs concurrent dispatches one after another too.
enum DispatchType : NS::UInteger { DispatchTypeSerial = 0, DispatchTypeConcurrent = 1 };

using BarrierScope = NS::UInteger;
enum : BarrierScope { BarrierScopeBuffers = 1, BarrierScopeTextures = 1 << 1, BarrierScopeRenderTargets = 1 << 2 };

/// Points where counters may be sampled. The stand-in samples at the beginning and end of encoders, as Apple's GPUs do.
enum CounterSamplingPoint : NS::UInteger {
  CounterSamplingPointAtStageBoundary = 0,
  CounterSamplingPointAtDrawBoundary = 1,
  CounterSamplingPointAtDispatchBoundary = 2,
  CounterSamplingPointAtTileDispatchBoundary = 3,
  CounterSamplingPointAtBlitBoundary = 4,
};

enum CounterSampleBufferError : NS::Integer {
  CounterSampleBufferErrorOutOfMemory = 0,
  CounterSampleBufferErrorInvalid = 1,
  CounterSampleBufferErrorInternal = 2,
};

using Timestamp = std::uint64_t;
/// In place of a sample that was not taken.
static const NS::UInteger CounterErrorValue = static_cast<NS::UInteger>(~0ULL);
static const NS::UInteger CounterDontSample = static_cast<NS::UInteger>(-1);

/// A sample of the set "timestamp".
struct CounterResultTimestamp {
  uint64_t timestamp;
};

using HandlerFunction = std::function<void(CommandBuffer*)>;
/// The stand-in reflects nothing: pass null.
using AutoreleasedComputePipelineReflection = ComputePipelineReflection*;

class Allocation : public NS::Referencing<Allocation> {
public:
  NS::UInteger allocatedSize() const;
};

class Resource : public NS::Referencing<Resource, Allocation> {
public:
  Device* device() const;
  NS::String* label() const;
  void setLabel(const NS::String* label);
  ResourceOptions resourceOptions() const;
  StorageMode storageMode() const;
};

class Buffer : public NS::Referencing<Buffer, Resource> {
public:
  void* contents();
  NS::UInteger length() const;
};

class Function : public NS::Referencing<Function> {
public:
  Device* device() const;
  NS::String* name() const;
  NS::String* label() const;
  void setLabel(const NS::String* label);
};

/// Values of function constants, for newFunction.
class FunctionConstantValues : public NS::Copying<FunctionConstantValues> {
public:
  static FunctionConstantValues* alloc();
  FunctionConstantValues* init();
  void reset();
  void setConstantValue(const void* value, MTL::DataType type, NS::UInteger index);
};

class Library : public NS::Referencing<Library> {
public:
  Device* device() const;
  NS::String* label() const;
  void setLabel(const NS::String* label);
  NS::Array* functionNames() const;
  /// Null where there is no function of that name.
  Function* newFunction(const NS::String* functionName);
  /// With its function constants set: all those that are read unguarded, in their own types; values of others are
  /// ignored. A function of a source with function constants makes pipelines only if it comes from here, with however
  /// few values. (Whether Apple's Metal insists on that is not documented.)
  Function* newFunction(const NS::String* name, const MTL::FunctionConstantValues* constantValues, NS::Error** error);
};

class ComputePipelineDescriptor : public NS::Copying<ComputePipelineDescriptor> {
public:
  static ComputePipelineDescriptor* alloc();
  ComputePipelineDescriptor* init();
  Function* computeFunction() const;
  void setComputeFunction(const Function* computeFunction);
  NS::String* label() const;
  void setLabel(const NS::String* label);
  /// Most threads per threadgroup that the pipeline will be dispatched with; 0: as many as the kernel allows.
  NS::UInteger maxTotalThreadsPerThreadgroup() const;
  void setMaxTotalThreadsPerThreadgroup(NS::UInteger maxTotalThreadsPerThreadgroup);
};

class ComputePipelineState : public NS::Referencing<ComputePipelineState, Allocation> {
public:
  Device* device() const;
  NS::String* label() const;
  NS::UInteger maxTotalThreadsPerThreadgroup() const;
  NS::UInteger threadExecutionWidth() const;
  NS::UInteger staticThreadgroupMemoryLength() const;
};

class CounterSet : public NS::Referencing<CounterSet> {
public:
  NS::String* name() const;
};

class CounterSampleBufferDescriptor : public NS::Copying<CounterSampleBufferDescriptor> {
public:
  static CounterSampleBufferDescriptor* alloc();
  CounterSampleBufferDescriptor* init();
  CounterSet* counterSet() const;
  void setCounterSet(const CounterSet* counterSet);
  NS::String* label() const;
  void setLabel(const NS::String* label);
  NS::UInteger sampleCount() const;
  void setSampleCount(NS::UInteger sampleCount);
  StorageMode storageMode() const;
  void setStorageMode(StorageMode storageMode);
};

class CounterSampleBuffer : public NS::Referencing<CounterSampleBuffer> {
public:
  Device* device() const;
  NS::String* label() const;
  NS::UInteger sampleCount() const;
  /// A CounterResultTimestamp for each sample. On a cuda device waits for those that the GPU has yet to take.
  NS::Data* resolveCounterRange(NS::Range range);
};

class ComputePassSampleBufferAttachmentDescriptor : public NS::Copying<ComputePassSampleBufferAttachmentDescriptor> {
public:
  static ComputePassSampleBufferAttachmentDescriptor* alloc();
  ComputePassSampleBufferAttachmentDescriptor* init();
  CounterSampleBuffer* sampleBuffer() const;
  void setSampleBuffer(const CounterSampleBuffer* sampleBuffer);
  NS::UInteger startOfEncoderSampleIndex() const;
  void setStartOfEncoderSampleIndex(NS::UInteger startOfEncoderSampleIndex);
  NS::UInteger endOfEncoderSampleIndex() const;
  void setEndOfEncoderSampleIndex(NS::UInteger endOfEncoderSampleIndex);
};

class ComputePassSampleBufferAttachmentDescriptorArray
    : public NS::Referencing<ComputePassSampleBufferAttachmentDescriptorArray> {
public:
  /// The stand-in has one attachment, index 0.
  ComputePassSampleBufferAttachmentDescriptor* object(NS::UInteger attachmentIndex);
};

class ComputePassDescriptor : public NS::Copying<ComputePassDescriptor> {
public:
  static ComputePassDescriptor* computePassDescriptor();
  static ComputePassDescriptor* alloc();
  ComputePassDescriptor* init();
  DispatchType dispatchType() const;
  void setDispatchType(DispatchType dispatchType);
  ComputePassSampleBufferAttachmentDescriptorArray* sampleBufferAttachments() const;
};

class Event : public NS::Referencing<Event> {
public:
  Device* device() const;
  NS::String* label() const;
  void setLabel(const NS::String* label);
};

/// Orders command buffers of different queues, and the host: a value that only grows.
class SharedEvent : public NS::Referencing<SharedEvent, Event> {
public:
  uint64_t signaledValue() const;
  void setSignaledValue(uint64_t signaledValue);
};

class CommandEncoder : public NS::Referencing<CommandEncoder> {
public:
  Device* device() const;
  NS::String* label() const;
  void setLabel(const NS::String* label);
  void endEncoding();
};

class ComputeCommandEncoder : public NS::Referencing<ComputeCommandEncoder, CommandEncoder> {
public:
  DispatchType dispatchType() const;
  void setComputePipelineState(const ComputePipelineState* state);
  void setBuffer(const Buffer* buffer, NS::UInteger offset, NS::UInteger index);
  void setBufferOffset(NS::UInteger offset, NS::UInteger index);
  void setBytes(const void* bytes, NS::UInteger length, NS::UInteger index);
  void setThreadgroupMemoryLength(NS::UInteger length, NS::UInteger index);
  void dispatchThreadgroups(Size threadgroupsPerGrid, Size threadsPerThreadgroup);
  void memoryBarrier(BarrierScope scope);
};

class CommandBuffer : public NS::Referencing<CommandBuffer> {
public:
  Device* device() const;
  CommandQueue* commandQueue() const;
  NS::String* label() const;
  void setLabel(const NS::String* label);

  ComputeCommandEncoder* computeCommandEncoder();
  ComputeCommandEncoder* computeCommandEncoder(DispatchType dispatchType);
  /// An encoder whose beginning and end are sampled.
  ComputeCommandEncoder* computeCommandEncoder(const ComputePassDescriptor* computePassDescriptor);
  /// Sets the event's value when all that was encoded before has run.
  void encodeSignalEvent(const Event* event, uint64_t value);
  /// What is encoded after runs when the event's value is at least this.
  void encodeWait(const Event* event, uint64_t value);
  void enqueue();
  void commit();
  /// May execute this and earlier buffers of the queue, and their completion handlers, on the calling thread.
  void waitUntilCompleted();
  void waitUntilScheduled();
  /// Runs after execution, on whichever thread executed the buffer, before waitUntilCompleted() returns.
  void addCompletedHandler(const HandlerFunction& function);
  void addScheduledHandler(const HandlerFunction& function);

  CommandBufferStatus status() const;
  NS::Error* error() const;
  bool retainedReferences() const;
  /// Seconds on the host's monotonic clock.
  CFTimeInterval GPUStartTime() const;
  CFTimeInterval GPUEndTime() const;
};

class CommandQueue : public NS::Referencing<CommandQueue> {
public:
  Device* device() const;
  NS::String* label() const;
  void setLabel(const NS::String* label);
  CommandBuffer* commandBuffer();
  /// The caller keeps buffers and pipelines alive until the command buffer has completed.
  CommandBuffer* commandBufferWithUnretainedReferences();
};

class Device : public NS::Referencing<Device> {
public:
  NS::String* name() const;
  uint64_t registryID() const;
  bool hasUnifiedMemory() const;
  NS::UInteger maxBufferLength() const;
  NS::UInteger maxThreadgroupMemoryLength() const;
  Size maxThreadsPerThreadgroup() const;
  NS::UInteger currentAllocatedSize() const;
  uint64_t recommendedMaxWorkingSetSize() const;

  Buffer* newBuffer(NS::UInteger length, ResourceOptions options);
  /// A new buffer that begins as a copy of the memory.
  Buffer* newBuffer(const void* pointer, NS::UInteger length, ResourceOptions options);
  /// The caller's memory itself, at any alignment (Apple: whole pages); the deallocator may be null.
  Buffer* newBuffer(const void* pointer, NS::UInteger length, ResourceOptions options,
                    const std::function<void(void*, NS::UInteger)>& deallocator);

  CommandQueue* newCommandQueue();
  CommandQueue* newCommandQueue(NS::UInteger maxCommandBufferCount);
  /// A directory of kernel libraries (one per engine and processor level) or a single one.
  Library* newLibrary(const NS::String* filepath, NS::Error** error);
  ComputePipelineState* newComputePipelineState(const Function* computeFunction, NS::Error** error);
  ComputePipelineState* newComputePipelineState(const ComputePipelineDescriptor* descriptor, PipelineOption options,
                                                const AutoreleasedComputePipelineReflection* reflection,
                                                NS::Error** error);
  SharedEvent* newSharedEvent();

  bool supportsCounterSampling(CounterSamplingPoint samplingPoint);
  /// One set, "timestamp", where the engine tells time: nanoseconds of the host's monotonic clock.
  NS::Array* counterSets() const;
  CounterSampleBuffer* newCounterSampleBuffer(const CounterSampleBufferDescriptor* descriptor, NS::Error** error);
  /// The same moment on the host's clock and on the device's.
  void sampleTimestamps(Timestamp* cpuTimestamp, Timestamp* gpuTimestamp);
};

/// Owned by the caller. Native engine.
Device* CreateSystemDefaultDevice();
/// Owned by the caller: the devices named "native (<processor level>)" and "exact".
NS::Array* CopyAllDevices();

} // namespace MTL
