# What demo.sh and test.sh share: the Debian packages that circlet is built with, and how missing ones get installed.

# libdnnl-dev only recommends ocl-icd-opencl-dev, but find_package(dnnl) asks for it.
packages=(g++ cmake ninja-build pkg-config libdnnl-dev ocl-icd-opencl-dev libflatbuffers-dev nlohmann-json3-dev
  libyaml-cpp-dev libcli11-dev libfmt-dev libjpeg62-turbo-dev libpng-dev zlib1g-dev libwebp-dev libgif-dev
  libtiff-dev libhwy-dev libssl-dev)
test_packages=(libgtest-dev libgmock-dev xz-utils libopenmpi-dev openmpi-bin python3-numpy)
fuzz_packages=(clang libclang-rt-14-dev libomp-dev)

# Installs those of "$@" that are missing. Where that cannot be done it says in one line which ones and why, and exits
# with 2.
install_missing() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0

  local root=() log reached=1
  if ! command -v apt-get >/dev/null; then
    cannot_install "there is no apt-get here"
  elif [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || cannot_install "this is not root and there is no sudo"
    root=(sudo)
    [ -t 0 ] || root=(sudo -n)  # nobody is there to type a password
    "${root[@]}" true 2>/dev/null || cannot_install "this is not root and sudo refuses"
  fi
  echo "installing ${missing[*]}"
  log=$(mktemp)
  # One source of several that is out of reach need not matter, so the installation is tried all the same.
  "${root[@]}" apt-get update -qq -o APT::Update::Error-Mode=any >"$log" 2>&1 </dev/null || reached=0
  if ! "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
    >>"$log" 2>&1 </dev/null; then
    local error
    error=$(grep -m 1 '^E: ' "$log" || tail -n 1 "$log")
    rm -f "$log"
    [ $reached -eq 1 ] || error="the package archive is out of reach; $error"
    cannot_install "$error"
  fi
  rm -f "$log"
}

# Reads `missing` of install_missing.
cannot_install() {
  echo "${0##*/}: cannot install ${missing[*]}: $1. As root: apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 2
}

# A compiler cache where there is one. CMake reads the variable only when it makes a build directory, so no later run
# compiles everything again because of it.
if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER="${CMAKE_CXX_COMPILER_LAUNCHER-ccache}"
fi
