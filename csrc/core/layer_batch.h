// Operations of one thread that are encoded one behind the other instead of being waited for one by one.
#pragma once

#include "context.h"

#include <list>
#include <memory>
#include <mutex>
#include <thread>

namespace metal_moe {

/// An owned stream that several threads may use, each call by itself, and that may be closed before its last user is
/// done with it.
class SharedStream {
public:
  SharedStream(Context& context, const CommandStream::Policy& policy)
      : context_(context), stream_(context.new_stream(policy)) {}
  /// As close().
  ~SharedStream() { close(); }

  Context& context() const { return context_; }

  /// Calls `use(stream)`, alone. std::runtime_error naming `operation` where the stream is closed or the parent's of a
  /// fork, std::logic_error in one of its completion handlers.
  template <class Use>
  auto use(const char* operation, const Use& use) {
    check_caller(operation);
    const std::lock_guard lock(mutex_);
    if (!stream_)
      throw std::runtime_error(std::string(operation) + ": the stream is closed");
    return use(*stream_);
  }

  /// Drops what is encoded and not committed, waits for the rest and its handlers. Kept errors are lost. A second call
  /// does nothing. std::logic_error in a completion handler.
  void close();
  bool is_closed() const;
  /// Whether the caller is one of its completion handlers.
  bool is_handling() const { return CommandStream::handling() == address_; }

private:
  /// Without the lock: who waits for a handler holds it.
  void check_caller(const char* operation) const;

  Context& context_;
  const uint32_t generation_ = fork_generation();
  mutable std::recursive_mutex mutex_; // an object that the stream lets go may use it
  std::unique_ptr<CommandStream> stream_;
  const CommandStream* const address_ = stream_.get();
};

/// While a thread has entered a batch, its operations go to a stream of the batch. Two kinds:
/// - of layers: leases a stream of each context it meets, and commits it when it holds `layers` layers;
/// - of a SharedStream: that stream, for operations of its context, committed as its policy says.
/// Batches nest: one of layers uses the stream of a batch around it where that has one for the operation's context, so
/// that operations run in the order in which they were encoded.
///
/// The thread that enters leaves, in any order. Made by std::make_shared: a batch that is entered is kept.
class LayerBatch : public std::enable_shared_from_this<LayerBatch> {
public:
  struct Statistics {
    uint64_t layers = 0;     // encoded
    uint64_t operations = 0; // encoded, layers among them
    uint64_t commits = 0;    // by this batch, of command buffers
    uint64_t passed = 0;     // operations on streams of the program or of another context: it does nothing for them
  };

  /// Layers are never split. `waits`: whether leave() waits; without, somebody around must. `layers` > 0.
  LayerBatch(uint32_t layers, bool waits) : layers_(layers), waits_(waits) {}
  explicit LayerBatch(std::shared_ptr<SharedStream> stream) : layers_(0), waits_(false), shared_(std::move(stream)) {}
  LayerBatch(const LayerBatch&) = delete;
  LayerBatch& operator=(const LayerBatch&) = delete;

  /// The innermost one of the calling thread, or null.
  static LayerBatch* current() { return innermost; }

  /// std::logic_error where it is entered already, or does not wait and has none around it.
  void enter();
  /// Commits; waits where it is to, and throws what failed (ExecutionError). It has left, whatever is thrown.
  /// std::logic_error where the calling thread has not entered it.
  void leave();
  bool entered() const { return static_cast<bool>(self_); }
  /// The one around it, or null.
  const LayerBatch* outer() const { return outer_; }

  /// Calls `encode(stream)` with the stream for operations of `context`, or returns false where such operations run on
  /// a stream of the program (or this batch is of another context); observers are told of the first. `kept` is let go
  /// when they have completed. `is_layer`: whether the operation ends a layer. What `encode` throws comes back, and the
  /// dispatches it had encoded stay: they write what `kept` and the scratch hold, and nobody reads it.
  template <class Encode>
  bool encode(Context& context, bool is_layer, std::shared_ptr<void> kept, const Encode& encode) {
    return with_target(context, [&](Target& target, CommandStream& stream) {
      stream.keep(std::move(kept));
      encode(stream);
      encoded(target, stream, is_layer);
    });
  }

  /// Commits every stream, those of batches around it among them.
  void commit();
  /// The same, waits, and throws the first error (ExecutionError).
  void synchronize();
  /// Drops what is encoded and not committed, on every stream.
  void discard();

  const Statistics& statistics() const { return statistics_; }

private:
  /// A stream of a context, and how much of a batch it holds.
  struct Target {
    Context& context;
    std::shared_ptr<SharedStream> shared; // or:
    std::unique_ptr<StreamLease> lease;
    uint32_t layers = 0; // encoded and not committed
  };

  /// Bound on dispatches of a command buffer: the longest layer has nine, so that it acts where operations that are no
  /// layers (routing, gathering) go on and on.
  static constexpr uint32_t DISPATCHES_PER_LAYER = 32;

  Target* target_of(Context& context);
  template <class Use>
  static auto use(Target& target, const Use& use) {
    return target.shared ? target.shared->use("encode", use) : use(**target.lease);
  }
  template <class Use>
  bool with_target(Context& context, const Use& function) {
    Target* target = target_of(context);
    if (!target) {
      pass(context);
      return false;
    }
    use(*target, [&](CommandStream& stream) { function(*target, stream); });
    return true;
  }
  void pass(const Context& context);
  void encoded(Target& target, CommandStream& stream, bool is_layer);
  template <class Use>
  void for_each_stream(const Use& function);

  static thread_local LayerBatch* innermost;

  const uint32_t layers_; // of a command buffer; 0: the stream's policy decides
  const bool waits_;
  const std::shared_ptr<SharedStream> shared_;
  std::list<Target> targets_; // of its own: one per context
  Statistics statistics_;

  LayerBatch* outer_ = nullptr;
  std::shared_ptr<LayerBatch> self_; // while entered
};

} // namespace metal_moe
