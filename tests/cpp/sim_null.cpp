// The device that runs nothing: everything else is as on the native one.
#include "metal_sim/control.h"
#include "sim_support.h"

namespace {

using namespace sim_test;

class Null : public testing::Test {
protected:
  Engine null{NS::TransferPtr(metal_sim::null_device())};
};

TEST_F(Null, CommandBuffersCompleteAndRunNothing) {
  const auto data = null.buffer(16);
  EXPECT_EQ(null.run("add_one", {data.get()}, {16, 1, 1}, {1, 1, 1}), "");
  EXPECT_TRUE(all_are(contents(data), 0));
}

TEST_F(Null, HandlersAreCalled) {
  int called = 0;
  auto* commands = null.queue->commandBuffer();
  commands->addCompletedHandler(MTL::HandlerFunction([&](MTL::CommandBuffer*) { ++called; }));
  commands->commit();
  commands->waitUntilCompleted();
  EXPECT_EQ(called, 1);
}

TEST_F(Null, MisuseIsFound) {
  EXPECT_TRUE(mentions(misuse([&] { null.run("add_one", {}, {1, 1, 1}, {1, 1, 1}); }), {"add_one", "not bound"}));
  EXPECT_TRUE(mentions(misuse([&] {
                         const auto data = null.buffer(1);
                         null.run("add_one", {data.get()}, {1, 1, 1}, {2, 1, 1});
                       }),
                       {"threadsPerThreadgroup", "more than 1"}));
}

TEST_F(Null, NobodyFindsItWhoDoesNotAskForIt) {
  const auto devices = NS::TransferPtr(MTL::CopyAllDevices());
  for (NS::UInteger i = 0; i < devices->count(); ++i)
    EXPECT_NE(devices->object<MTL::Device>(i), null.device.get());
  EXPECT_NE(NS::TransferPtr(MTL::CreateSystemDefaultDevice()).get(), null.device.get());
}

} // namespace
