#include "pipeline_archive.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <system_error>

#include <unistd.h>

namespace metal_moe {

namespace fs = std::filesystem;

namespace {

fs::path cache_folder() {
  const char* base = std::getenv("XDG_CACHE_HOME");
  if (base && *base)
    return fs::path(base) / "metal_moe" / "metal";
  const char* home = std::getenv("HOME");
  return home && *home ? fs::path(home) / "Library" / "Caches" / "metal_moe" : fs::path();
}

/// FNV-1a: names of files in one user's cache are told apart, nobody is kept out.
std::string hashed(const std::string& text) {
  uint64_t hash = 14695981039346656037u;
  for (const unsigned char byte : text)
    hash = (hash ^ byte) * 1099511628211u;
  char name[17];
  std::snprintf(name, sizeof name, "%016llx", static_cast<unsigned long long>(hash));
  return name;
}

NS::URL* file_url(const fs::path& path) { return NS::URL::fileURLWithPath(ns_string(path.c_str())); }

} // namespace

PipelineArchive::PipelineArchive(MTL::Device* device, const std::string& digest) : device_(device) {
  const AutoreleaseScope scope;
  const std::string system = to_string(NS::ProcessInfo::processInfo()->operatingSystemVersionString());
  if (const fs::path folder = cache_folder(); !folder.empty())
    path_ = folder / (hashed(digest + '|' + to_string(device->name()) + '|' + system) + ".metalarchive");
  open();
}

void PipelineArchive::open() {
  const auto descriptor = NS::TransferPtr(MTL::BinaryArchiveDescriptor::alloc()->init());
  std::error_code failure;
  if (!path_.empty() && fs::exists(path_, failure)) {
    descriptor->setUrl(file_url(path_));
    archive_ = NS::TransferPtr(device_->newBinaryArchive(descriptor.get(), nullptr));
    descriptor->setUrl(nullptr);
  }
  if (!archive_) // none yet, or one that Metal refuses: a new one replaces it
    archive_ = NS::TransferPtr(device_->newBinaryArchive(descriptor.get(), nullptr));
}

NS::SharedPtr<MTL::ComputePipelineState> PipelineArchive::pipeline(MTL::ComputePipelineDescriptor* descriptor) {
  const std::lock_guard lock(mutex_);
  if (!archive_)
    return {};
  const AutoreleaseScope scope;
  descriptor->setBinaryArchives(NS::Array::array(archive_.get()));
  const auto from_archive = [&] {
    return NS::TransferPtr(
        device_->newComputePipelineState(descriptor, MTL::PipelineOptionFailOnBinaryArchiveMiss, nullptr, nullptr));
  };
  auto state = from_archive();
  if (!state && archive_->addComputePipelineFunctions(descriptor, nullptr)) {
    save();
    state = from_archive();
  }
  descriptor->setBinaryArchives(nullptr);
  return state;
}

/// To a file of its own, then in place: another process may read or save at the same time.
void PipelineArchive::save() {
  if (path_.empty())
    return;
  std::error_code failure;
  fs::create_directories(fs::path(path_).parent_path(), failure);
  const fs::path temporary = path_ + "." + std::to_string(getpid());
  if (archive_->serializeToURL(file_url(temporary), nullptr))
    fs::rename(temporary, path_, failure);
  fs::remove(temporary, failure);
}

} // namespace metal_moe
