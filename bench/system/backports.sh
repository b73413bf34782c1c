#!/bin/sh
# backports.sh DIR: unpack qemu-img and qemu-io of bookworm-backports, which speak NBD's extended headers, under
# DIR (DIR/usr/bin/qemu-img), with the libraries that Debian 12 has not got, beside the stock ones and without
# installing anything. Needs apt and root; does nothing when they are there already.
set -eu
dir=${1:?usage: backports.sh DIR}
[ -x "$dir/usr/bin/qemu-img" ] && [ -x "$dir/usr/bin/qemu-io" ] && exit 0
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
apt=$dir/.apt
mkdir -p "$apt/lists/partial" "$apt/archives/partial"
cat >"$apt/sources.list" <<LIST
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main
LIST
options="-q -o Dir::Etc::sourcelist=$apt/sources.list -o Dir::Etc::sourceparts=/dev/null
 -o Dir::State::lists=$apt/lists -o Dir::Cache::archives=$apt/archives -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
 -o APT::Sandbox::User=root -o Debug::NoLocking=1"
apt-get $options update
# --download-only resolves what qemu-utils needs beyond what is installed.
apt-get $options install -y --no-install-recommends --download-only -t bookworm-backports qemu-utils
for deb in "$apt"/archives/*.deb; do
	dpkg-deb -x "$deb" "$dir"
done
rm -rf "$apt"
LD_LIBRARY_PATH=$dir/usr/lib/$(uname -m)-linux-gnu "$dir/usr/bin/qemu-img" --version
