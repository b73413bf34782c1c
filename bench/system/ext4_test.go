package system

import (
	"path/filepath"
	"strings"
	"testing"
)

// sourceTree packs part of Go's own source, about 60 MB of small files.
func sourceTree(t *testing.T) (tar, dir string) {
	t.Helper()
	root := strings.TrimSpace(run(t, "go", "env", "GOROOT"))
	tar, dir = filepath.Join(t.TempDir(), "tree.tar"), filepath.Join(root, "src")
	run(t, "tar", "-C", dir, "-cf", tar, "cmd/compile", "runtime", "net", "crypto", "internal", "go", "encoding")
	return tar, dir
}

// compareTrees checks that everything in the tar is in the directory, byte for byte.
func compareTrees(t *testing.T, tar, dir string) {
	t.Helper()
	run(t, "tar", "-C", dir, "-df", tar)
}

// TestExt4 makes a file system on the volume, by recipe R1, fills, trims and checks it.
func TestExt4(t *testing.T) {
	const size = 512 * mib
	tar, _ := sourceTree(t)
	s := serve(t, volume{size: size, memory: 96 * mib})
	point := t.TempDir()
	disk, unmount := fuseDisk(t, s.uri())
	dev := loop(t, disk, "--direct-io=on")
	run(t, "mkfs.ext4", "-q", "-F", dev)
	mount(t, dev, point)
	run(t, "tar", "-C", point, "-xf", tar)
	run(t, "sync", "-f", point)
	compareTrees(t, tar, point)
	run(t, "cp", "-a", point+"/runtime", point+"/copy")
	run(t, "rm", "-r", point+"/runtime")
	if out := run(t, "fstrim", "-v", point); strings.Contains(out, ": 0 B") {
		t.Errorf("fstrim: %s", out)
	}
	run(t, "mv", point+"/copy", point+"/runtime")
	run(t, "umount", point)
	run(t, "e2fsck", "-f", "-n", dev)

	// With an empty page cache the content comes from the server again.
	run(t, "sh", "-c", "blockdev --flushbufs "+dev)
	mount(t, dev, point)
	compareTrees(t, tar, point)
	run(t, "umount", point)
	detach(t, dev)
	unmount()
	checkRSS(t, s, 96*mib)
	if r, ok := s.(*ramshelf); ok {
		checkCleanStop(t, r, nil)
	} else {
		cleanStop(t, s)
	}
	run(t, "e2fsck", "-f", "-n", s.home())
}

// TestExternalJournal puts the journal of an ext4, which lies elsewhere, on the volume; the file system is
// killed together with nothing, then checked, with the journal in place.
func TestExternalJournal(t *testing.T) {
	tar, _ := sourceTree(t)
	s := serve(t, volume{size: 128 * mib, memory: 64 * mib, ack: "disk"})
	disk, unmount := fuseDisk(t, s.uri())
	journal := loop(t, disk, "--direct-io=on")
	run(t, "mke2fs", "-q", "-F", "-b", "4096", "-O", "journal_dev", journal)
	data := loop(t, sparse(t, filepath.Join(t.TempDir(), "data.img"), 512*mib))
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-J", "device="+journal, data)
	point := t.TempDir()
	mount(t, "-o", "data=journal,journal_path="+journal, data, point)
	run(t, "tar", "-C", point, "-xf", tar)
	run(t, "sync", "-f", point)
	compareTrees(t, tar, point)
	if r, ok := s.(*ramshelf); ok {
		if st := r.status(); st.AckInForce != "disk" || st.Backing.State != "ok" {
			t.Errorf("ack in force is %s, the backing is %s", st.AckInForce, st.Backing.State)
		}
	}
	run(t, "umount", point)
	run(t, "e2fsck", "-f", "-n", "-j", journal, data)
	mount(t, "-o", "journal_path="+journal, data, point)
	compareTrees(t, tar, point)
	run(t, "umount", point)
	detach(t, journal)
	unmount()
	cleanStop(t, s)
	// The journal is on the backing: it carries the file system without us.
	home := loop(t, s.home())
	run(t, "e2fsck", "-f", "-n", "-j", home, data)
}
