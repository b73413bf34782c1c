package system

import (
	"fmt"
	"testing"
)

// TestFio runs fio's nbd engine with verify over a device 16 times as large as the memory: several jobs on regions
// of their own, mixed sizes down to a sector.
func TestFio(t *testing.T) {
	const size, memory = gib, 64 * mib
	s := serve(t, volume{size: size, memory: memory})
	seconds := 6
	if soak {
		seconds = 120
	}
	job := fmt.Sprintf(`[global]
ioengine=nbd
uri=%s
verify=crc32c
verify_fatal=1
verify_backlog=256
serialize_overlap=1
thread=1
group_reporting=1
runtime=%d

[mixed]
rw=randrw
bssplit=512/20:1536/5:4k/40:12k/10:64k/20:256k/5
blockalign=512
iodepth=16
size=192m
offset_increment=192m
numjobs=3

[sequential]
rw=write
bs=128k
iodepth=8
offset=576m
size=192m

[small]
rw=randwrite
bs=512
iodepth=32
offset=768m
size=16m

[deep]
rw=randwrite
bs=4k
iodepth=128
offset=832m
size=64m
`, s.uri(), seconds)
	dir := t.TempDir()
	writeFile(t, dir+"/job.fio", job)
	r := command{dir: dir}.try(t, "sh", "-c", "exec fio --output=out job.fio >/dev/null 2>&1")
	if r.code != 0 {
		t.Errorf("fio: exit code %d\n%.4000s", r.code, slurp(dir+"/out"))
	}
	checkRSS(t, s, memory)
	if r, ok := s.(*ramshelf); ok {
		checkCleanStop(t, r, nil)
	}
}
