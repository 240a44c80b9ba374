#!/usr/bin/env bash
# Finds the pieces that Python's package index does not carry: a C++ compiler, Python's headers, clang (optional: compiles
# the kernels and checks their types), GoogleTest and Google Benchmark. As root on a machine with apt, what is missing is
# installed; otherwise the two libraries are unpacked below the build directory, which needs no rights, and the rest is
# named.
#
#   tools/system_packages.sh <python> <directory>
#
# Writes <directory>/system.env: TESTS and BENCH (ON or OFF), TYPING (ON or OFF: clang is new enough for the check of
# Metal's rules, make check-msl) and PREFIX (where unpacked packages lie, or empty).
set -euo pipefail
python=$1
directory=$2
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
unpacked=$directory/system

say() { printf '%s\n' "$*" >&2; }
have_compiler() { [ -n "${CXX:-}" ] || command -v g++ > /dev/null || command -v clang++ > /dev/null; }
have_headers() { "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; }
have_venv() { "$python" -c 'import ensurepip, venv' 2> /dev/null; }
newest_clang() { # major version, 0 where there is none
  local name version newest=0
  for name in clang++ clang++-{15..24}; do
    version=$("$name" -dumpversion 2> /dev/null) || continue
    [ "${version%%.*}" -gt $newest ] && newest=${version%%.*}
  done
  echo $newest
}
have_cmake_package() { # <name>Config.cmake, where CMake looks
  local place
  for place in {/usr,/usr/local,"$unpacked/usr"}/{lib,lib64,lib/*,share}/cmake/"$1"; do
    [ -e "$place/$1Config.cmake" ] && return 0
  done
  return 1
}

# What apt would have to install: package names, one for each missing piece.
wanted=()
have_compiler || wanted+=(g++)
have_headers || wanted+=(python3-dev)
have_venv || wanted+=(python3-venv)
have_cmake_package GTest || wanted+=(libgtest-dev)
have_cmake_package benchmark || wanted+=(libbenchmark-dev)
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && { [ ${#wanted[@]} -gt 0 ] || [ "$(newest_clang)" -lt 19 ]; }; then
  export DEBIAN_FRONTEND=noninteractive
  say "system packages: updating apt's lists"
  apt-get update -qq > /dev/null 2>&1 || say "system packages: apt-get update failed; going on with the lists there are"
  if [ "$(newest_clang)" -lt 19 ]; then
    # The version that tests are run with, then newer ones, then older ones.
    for version in 19 20 21 22 18 17 16 15; do
      if apt-cache show "clang-$version" > /dev/null 2>&1; then
        say "system packages: installing clang-$version"
        apt-get install -qq -y --no-install-recommends "clang-$version" > /dev/null 2>&1 ||
          say "system packages: clang-$version could not be installed"
        break
      fi
    done
  fi
  for package in "${wanted[@]}"; do
    say "system packages: installing $package"
    apt-get install -qq -y --no-install-recommends "$package" > /dev/null 2>&1 ||
      say "system packages: $package could not be installed"
  done
elif command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null; then
  for package in "${wanted[@]}"; do
    case $package in libgtest-dev | libbenchmark-dev) ;; *) continue ;; esac
    say "system packages: unpacking $package into $unpacked"
    mkdir -p "$unpacked/archives"
    # A library package that the -dev package points into comes along.
    libraries=$(apt-cache depends "$package" 2> /dev/null | sed -n 's/^ *Depends: \(libbenchmark.*\)$/\1/p')
    # shellcheck disable=SC2086
    if (cd "$unpacked/archives" && apt-get download $package $libraries > /dev/null 2>&1); then
      for archive in "$unpacked"/archives/*.deb; do dpkg-deb -x "$archive" "$unpacked"; done
    fi
    rm -rf "$unpacked/archives"
  done
fi

missing=()
have_compiler || missing+=("a C++20 compiler (Debian and Ubuntu: g++)")
have_headers || missing+=("Python's C headers for $python (Debian and Ubuntu: python3-dev)")
have_venv || missing+=("Python's venv module for $python (Debian and Ubuntu: python3-venv)")
if [ ${#missing[@]} -gt 0 ]; then
  say "system packages: these are missing, install them and run make again:"
  printf '  - %s\n' "${missing[@]}" >&2
  exit 1
fi
have_cmake_package GTest && tests=ON || tests=OFF
have_cmake_package benchmark && bench=ON || bench=OFF
[ $tests = ON ] || say "system packages: GoogleTest (Debian and Ubuntu: libgtest-dev) is missing: the C++ tests cannot be built"
[ $bench = ON ] || say "system packages: Google Benchmark (libbenchmark-dev) is missing: the C++ benchmarks cannot be built"
clang=$(newest_clang)
[ "$clang" -ge 19 ] && typing=ON || typing=OFF
[ "$clang" -ge 15 ] || say "system packages: clang (Debian and Ubuntu: clang-19) is missing: kernels are built with g++"
[ $typing = ON ] || say "system packages: no clang of version 19 or later: Metal's rules cannot be checked (make check-msl)"
[ -d "$unpacked/usr" ] && prefix=$unpacked/usr || prefix=
printf 'TESTS=%s\nBENCH=%s\nTYPING=%s\nPREFIX=%s\n' "$tests" "$bench" "$typing" "'$prefix'" > "$directory/system.env"
