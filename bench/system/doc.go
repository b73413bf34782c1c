// Package system tests the finished binary from outside, with the tools that people use: libnbd's nbdinfo,
// nbdcopy and nbdsh, qemu's, fio, a file system on a loop device with databases on it, kill -9, and nbdkit as a
// backing that fails on demand. It knows the command line and the wire, and nothing of the code behind them.
//
// The tests need root, Debian's packages of those tools, and qemu-img and qemu-io of bookworm-backports (see
// backports.sh). A missing tool is a failure, never a skip. Environment:
//
//	RAMSHELF          the binary under test; built from this tree when empty
//	RAMSHELF_SOAK     1 runs the long forms (kill -9 at 30 random moments, longer loads); counts rounds in out/soak
//	RAMSHELF_KILLS    how often the crash tests kill, instead of 6 (30 in a soak)
//	RAMSHELF_CUTS     how often TestPowerCut cuts the power, instead of 40 (2000 in a soak)
//	RAMSHELF_SOAK_MINUTES  how long a soak of power cuts may take, instead of 90; the next one takes up where it stopped,
//	                  by out/soak/powercut.json
//	RAMSHELF_DATABASE_CUTS  how often each database test cuts the power, instead of 3 (50 in a soak)
//	RAMSHELF_HISTORIES, RAMSHELF_LARGE_HISTORIES  how many random histories the oracle of power cuts is tested with
//	RAMSHELF_TARGET   nbdkit runs the tests that any server must pass against nbdkit instead, to calibrate them
package system
