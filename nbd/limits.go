package nbd

import "time"

// Limits of a server. Each of them keeps one client from taking what the others need.
const (
	// maxOptionBytes is the most data of an option that is read: any name, list of informations or list of
	// queries that a real client sends is far shorter.
	maxOptionBytes = 64 << 10
	// maxDiscardBytes is the most data of an option that is read and thrown away, so that the client gets
	// ERR_TOO_BIG; a longer option ends the connection.
	maxDiscardBytes = 4 * maxOptionBytes
	// maxOptions is how many options a client may send, and how many more per export of an answered LIST:
	// enough to ask for everything about every export.
	maxOptions = 32
	// maxInfoRequests is the most informations that INFO and GO may ask for; the protocol has four.
	maxInfoRequests = 64

	// maxPayloadBytes is the largest MaxPayload, which is what clients may assume that a server takes.
	maxPayloadBytes = 32 << 20
	// maxDiscardPayloadBytes is the longest payload that is read and thrown away to answer with an error; a
	// longer one ends the connection.
	maxDiscardPayloadBytes = 64 << 20

	// maxInFlight is how many requests of a connection are at work at once. Linux sends up to 128 per socket;
	// more keep a batching client's pipeline full while the replies of the batch before are on their way.
	maxInFlight = 512
	// maxInFlightBytes bounds the data that the requests of a connection hold: room for 64 requests of 256 KiB,
	// the habit of nbdcopy. A single request may be larger.
	maxInFlightBytes = 16 << 20

	// smallBufferBytes is the receive buffer of a connection that never sent more at once.
	smallBufferBytes = 16 << 10
	// receiveBufferBytes is the receive buffer of a busy connection: a payload of 256 KiB with its header, and
	// more than a stock socket buffer holds, so that one read takes everything.
	receiveBufferBytes = 320 << 10
	// inPlaceBytes is from which length on a payload that has not arrived in full is received straight into the room
	// of the device: the copy that this saves costs more than a read of so many pieces.
	inPlaceBytes = 32 << 10
	// headerArenaBytes holds the headers of the replies of one gathered write.
	headerArenaBytes = 8 << 10
	// maxIovecs is the most pieces of one writev or readv (UIO_MAXIOV).
	maxIovecs = 1024
	// gatherBytes is how much reply data a batch collects before it is sent on the way: about what a stock
	// socket buffer takes, so that the client works on the first replies while the rest is being made.
	gatherBytes = 192 << 10

	// MaxExtents is the most extents per context in one answer to BLOCK_STATUS; a client asks again from
	// where the answer ended.
	MaxExtents = 1024

	// socketBufferBytes is asked for on unix sockets, whose stock buffers cost throughput.
	socketBufferBytes = 2 << 20

	// slowBytesPerSecond and slowAfter say who is slow: a client that moves less, after that time, is cut
	// where it holds what others wait for.
	slowBytesPerSecond = 1 << 20

	// maxIdleSessions is how many sessions without a connection an export remembers.
	maxIdleSessions = 4096

	// lingerTimeout is how long a client of a server that stops gets to receive its last replies, and lingerPoll
	// how often it is looked whether it has.
	lingerTimeout = time.Second
	lingerPoll    = 5 * time.Millisecond

	// logBurst and logPerSecond bound what clients can make the server log.
	logBurst     = 50
	logPerSecond = 10
)

// Defaults of Options.
const (
	defaultMaxConnections = 512
	defaultStagingBytes   = 16 << 20

	defaultHandshakeTimeout = 10 * time.Second
	defaultStallTimeout     = 30 * time.Second
	defaultUnreadTimeout    = 60 * time.Second
	defaultSlowAfter        = 5 * time.Second
)
