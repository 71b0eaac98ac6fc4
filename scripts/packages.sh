# Debian packages that circlet is built with, installed when missing. Sourced by demo.sh and test.sh.
packages=(g++ cmake ninja-build pkg-config libdnnl-dev libflatbuffers-dev nlohmann-json3-dev libyaml-cpp-dev libcli11-dev
  libfmt-dev libjpeg62-turbo-dev libpng-dev zlib1g-dev libwebp-dev libgif-dev libtiff-dev libhwy-dev libssl-dev)
test_packages=(libgtest-dev libgmock-dev xz-utils libopenmpi-dev openmpi-bin)

install_missing() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  local root=()
  [ "$(id -u)" -eq 0 ] || root=(sudo)
  echo "installing ${missing[*]}"
  "${root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}
