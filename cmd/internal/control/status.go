// Package control is how one asks a running daemon: HTTP and JSON on a unix socket, the documented types, the
// server and its client. The JSON is stable (docs/OPERATIONS.md, "Status"): fields are added, never renamed, and
// unknown ones are to be ignored. Numbers are plain, in the unit that ends their name.
package control

// Schema is the version of the JSON.
const Schema = 1

// Status is what a daemon knows about itself: GET /v1/status.
type Status struct {
	Schema    int            `json:"schema"`
	Version   string         `json:"version"`
	PID       int            `json:"pid"`
	IOFlusher bool           `json:"io_flusher"` // PR_SET_IO_FLUSHER holds: safe under a device of this host
	Volumes   []VolumeStatus `json:"volumes"`
}

// Role is the part of a node in a pair; a volume without a peer is primary.
type Role string

// The roles.
const (
	RolePrimary   Role = "primary"
	RoleSecondary Role = "secondary"
)

// State is the condition of a volume.
type State string

// The states of a volume.
const (
	StateOK         State = "ok"
	StateRecovering State = "recovering" // not serving yet
	StateDegraded   State = "degraded"   // serving, with less protection than asked for
	StateFailed     State = "failed"     // writes cannot become durable
	StateReadonly   State = "readonly"
)

// BackingState is the condition of a backing.
type BackingState string

// The states of a backing.
const (
	BackingOK     BackingState = "ok"
	BackingSlow   BackingState = "slow"
	BackingFailed BackingState = "failed"
)

// VolumeStatus is one volume of a Status.
type VolumeStatus struct {
	Name       string   `json:"name"`
	Role       Role     `json:"role"`
	State      State    `json:"state"`
	Ack        string   `json:"ack"`          // as configured
	AckInForce string   `json:"ack_in_force"` // as it holds now
	Emergency  bool     `json:"emergency"`    // was turned on, and not off
	Flush      string   `json:"flush"`
	Exports    []string `json:"exports"` // addresses, as NBD URIs

	SizeBytes             int64   `json:"size_bytes"`
	MemoryBytes           int64   `json:"memory_bytes"`
	ResidentBytes         int64   `json:"resident_bytes"`
	FreeBytes             int64   `json:"free_bytes"`
	DirtyBytes            int64   `json:"dirty_bytes"`             // not yet home and synced
	UncommittedBytes      int64   `json:"uncommitted_bytes"`       // lost if the RAM is lost now
	UncommittedAgeSeconds float64 `json:"uncommitted_age_seconds"` // of the oldest uncommitted write
	UncommittedLimitBytes int64   `json:"uncommitted_limit_bytes"` // what may be uncommitted now
	CommitSeconds         float64 `json:"commit_seconds"`          // how long committing it would take; 0 while no rate is known
	FillRemainingBytes    int64   `json:"fill_remaining_bytes"`    // of the background fill
	DrainRemainingBytes   int64   `json:"drain_remaining_bytes"`   // of a clean stop under way
	LostBlocks            uint64  `json:"lost_blocks"`             // unreadable until rewritten
	Generation            uint64  `json:"generation"`

	Epoch   Epoch         `json:"epoch"`
	Peer    *Peer         `json:"peer"` // null without one
	Backing BackingStatus `json:"backing"`
	Journal JournalStatus `json:"journal"`

	Clients int     `json:"clients"` // connections that are past their handshake
	Reads   Traffic `json:"reads"`
	Writes  Traffic `json:"writes"`
	Zeroes  Traffic `json:"zeroes"` // TRIM and WRITE_ZEROES
	Flushes uint64  `json:"flushes"`
	Hits    uint64  `json:"hits"`   // blocks read that were resident
	Misses  uint64  `json:"misses"` // blocks read that had to be filled
}

// Epoch numbers the seals of a volume.
type Epoch struct {
	Open      uint64 `json:"open"`      // takes the writes of now
	Committed uint64 `json:"committed"` // the last one that survives the loss of the RAM
}

// Peer is the other node of a pair, as this one sees it.
type Peer struct {
	State          string `json:"state"` // Connected, Connecting, StandAlone, SyncSource, SyncTarget or SplitBrain
	OutOfSyncBytes int64  `json:"out_of_sync_bytes"`
}

// BackingStatus is where the content of a volume is kept.
type BackingStatus struct {
	State        BackingState `json:"state"`
	Kind         string       `json:"kind"`    // file, device or nbd
	Address      string       `json:"address"` // as it was given
	Error        string       `json:"error"`   // the last one while State is not ok
	WrittenBytes int64        `json:"written_bytes"`
	Writes       uint64       `json:"writes"`
	Syncs        uint64       `json:"syncs"`
	Durability   string       `json:"durability"` // what a sync of this backing is worth, in words
}

// JournalStatus is the journal of a volume.
type JournalStatus struct {
	Kind                  string `json:"kind"`    // none, internal or external
	Address               string `json:"address"` // of an external one, as it was given
	Bytes                 int64  `json:"bytes"`
	UsedBytes             int64  `json:"used_bytes"`               // not home yet, or not known to be
	WrittenBytes          int64  `json:"written_bytes"`            // since the daemon started
	BytesPerSecond        int64  `json:"bytes_per_second"`         // median of the last large commits; 0: there was none
	SlowestBytesPerSecond int64  `json:"slowest_bytes_per_second"` // their first percentile
}

// Range is a part of a volume.
type Range struct {
	OffsetBytes int64 `json:"offset_bytes"`
	LengthBytes int64 `json:"length_bytes"`
}

// Traffic counts requests of one kind since the daemon started.
type Traffic struct {
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
}
