// Reference counts, autorelease pools, strings and arrays behave as Foundation's do.
#include "sim_support.h"

#include <thread>

namespace {

using namespace sim_test;

NS::SharedPtr<NS::AutoreleasePool> new_pool() { return NS::TransferPtr(NS::AutoreleasePool::alloc()->init()); }

/// A buffer that counts how often it was freed.
NS::SharedPtr<MTL::Buffer> witness(int& freed) {
  static uint32_t word;
  return NS::TransferPtr(device("native")->newBuffer(&word, sizeof word, MTL::ResourceStorageModeShared,
                                                     [&freed](void*, NS::UInteger) { ++freed; }));
}

TEST(Ownership, NewObjectsBelongToTheCaller) {
  int freed = 0;
  MTL::Buffer* buffer = witness(freed)->retain();
  EXPECT_EQ(buffer->retainCount(), 1u);
  EXPECT_EQ(buffer->retain(), buffer);
  EXPECT_EQ(buffer->retainCount(), 2u);
  buffer->release();
  EXPECT_EQ(freed, 0);
  buffer->release();
  EXPECT_EQ(freed, 1);
}

TEST(Ownership, SharedPtrCountsReferences) {
  int freed = 0;
  {
    auto first = witness(freed);
    NS::SharedPtr<MTL::Resource> second = first; // to a base class
    EXPECT_EQ(first->retainCount(), 2u);
    auto third = std::move(first);
    EXPECT_FALSE(first);
    EXPECT_EQ(third->retainCount(), 2u);
    third = nullptr;
    EXPECT_EQ(second->retainCount(), 1u);
    auto& same = second;
    second = same;
    EXPECT_EQ(second->retainCount(), 1u);
    const auto fourth = NS::RetainPtr(second.get());
    EXPECT_EQ(second->retainCount(), 2u);
    EXPECT_TRUE(second == fourth);
    MTL::Resource* raw = second.get();
    second.detach();
    EXPECT_EQ(raw->retainCount(), 2u);
    raw->release();
  }
  EXPECT_EQ(freed, 1);
}

TEST(AutoreleasePool, ReleasesWhenItEnds) {
  int freed = 0;
  auto pool = new_pool();
  witness(freed)->retain()->autorelease();
  EXPECT_EQ(freed, 0);
  pool.reset();
  EXPECT_EQ(freed, 1);
}

TEST(AutoreleasePool, TheInnermostTakesTheObject) {
  int inner_freed = 0, outer_freed = 0;
  auto outer = new_pool();
  witness(outer_freed)->retain()->autorelease();
  auto inner = new_pool();
  witness(inner_freed)->retain()->autorelease();
  inner.reset();
  EXPECT_EQ(inner_freed, 1);
  EXPECT_EQ(outer_freed, 0);
  witness(outer_freed)->retain()->autorelease();
  outer.reset();
  EXPECT_EQ(outer_freed, 2);
}

TEST(AutoreleasePool, EndingOneEndsThoseInside) {
  int freed = 0;
  auto outer = new_pool();
  auto inner = new_pool();
  witness(freed)->retain()->autorelease();
  outer->retain();
  outer->release();
  EXPECT_EQ(freed, 0);
  outer.reset();
  EXPECT_EQ(freed, 1);
  inner.reset(); // harmless
}

TEST(AutoreleasePool, WithoutOneTheThreadsEndReleases) {
  int freed = 0;
  std::thread([&] { witness(freed)->retain()->autorelease(); }).join();
  EXPECT_EQ(freed, 1);
}

TEST(String, HoldsUtf8AndCountsUtf16) {
  const auto pool = new_pool();
  const auto text = NS::TransferPtr(NS::String::alloc()->init("na\u00efve \U0001F600", NS::UTF8StringEncoding));
  EXPECT_STREQ(text->utf8String(), "na\u00efve \U0001F600");
  EXPECT_EQ(text->length(), 8u); // the last one is a surrogate pair
  EXPECT_EQ(text->lengthOfBytes(NS::UTF8StringEncoding), 11u);
  EXPECT_TRUE(text->isEqualToString(str(text->utf8String())));
  EXPECT_FALSE(text->isEqualToString(NS::String::string()));
  EXPECT_STREQ(str("a")->stringByAppendingString(str("b"))->utf8String(), "ab");
}

TEST(String, LiteralsAreOneObject) {
  const auto make = [] { return MTLSTR("literal"); };
  EXPECT_EQ(make(), make());
  EXPECT_TRUE(make()->isEqual(str("literal")));
  EXPECT_EQ(make()->hash(), str("literal")->hash());
}

TEST(Array, KeepsItsObjects) {
  int freed = 0;
  {
    const auto pool = new_pool();
    const NS::Object* raw = witness(freed).get()->retain();
    NS::Array* array = NS::Array::array(&raw, 1);
    const_cast<NS::Object*>(raw)->release();
    EXPECT_EQ(array->count(), 1u);
    EXPECT_EQ(array->object(0), raw);
    EXPECT_EQ(freed, 0);
    EXPECT_TRUE(mentions(misuse([&] { array->object(1); }), {"index 1 beyond count 1"}));
  }
  EXPECT_EQ(freed, 1);
}

} // namespace
