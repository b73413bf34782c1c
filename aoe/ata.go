package aoe

// ATAFlags say how the argument of an ATA frame is meant.
type ATAFlags uint8

// ATA flags.
const (
	ATAExtended ATAFlags = 0x40 // the LBA has 48 bits
	ATADevice   ATAFlags = 0x10 // bit 4 of the Device/Head register
	ATAAsync    ATAFlags = 0x02 // a write may be answered before it is on the medium
	ATAWrite    ATAFlags = 0x01 // data go to the target
)

// ATACommand is the code of an ATA command.
type ATACommand uint8

// ATA commands that targets are known to answer.
const (
	ATARead         ATACommand = 0x20
	ATAReadExt      ATACommand = 0x24
	ATAReadDMAExt   ATACommand = 0x25
	ATAWriteSectors ATACommand = 0x30
	ATAWriteExt     ATACommand = 0x34
	ATAWriteDMAExt  ATACommand = 0x35
	ATAReadDMA      ATACommand = 0xC8
	ATAWriteDMA     ATACommand = 0xCA
	ATACheckPower   ATACommand = 0xE5
	ATAFlush        ATACommand = 0xE7
	ATAFlushExt     ATACommand = 0xEA
	ATAIdentify     ATACommand = 0xEC
)

const (
	// DeviceLBA is the Device of an LBA28 request.
	DeviceLBA = 0xE0

	maskLBA28 = 1<<28 - 1
	maskLBA48 = 1<<48 - 1
	// statusFailed are the bits of which a successful response has none.
	statusFailed = StatusBusy | StatusFault | StatusDataRequest | StatusError
)

// Bits of the status register in a response.
const (
	StatusError       = 0x01
	StatusDataRequest = 0x08
	StatusFault       = 0x20
	StatusReady       = 0x40
	StatusBusy        = 0x80
)

// Bits of the error register in a response.
const (
	ErrorAborted       = 0x04
	ErrorIDNotFound    = 0x10
	ErrorUncorrectable = 0x40
)

// ATA is the argument of an ATA frame. In a request Feature and Command are the registers of that name; in a response
// Feature is the error register, Command the status register, and Count the sectors that were not transferred.
type ATA struct {
	Flags   ATAFlags
	Feature uint8
	Count   uint8 // sectors; 0 is none, not 256
	Command ATACommand
	LBA     uint64 // of 48 bits, or of 28 without ATAExtended; in a response it means nothing
	Device  uint8  // the high half of Device/Head, without ATAExtended; 0 with it
}

// Failed reports whether the status register of a response says that the command failed.
func (a *ATA) Failed() bool { return a.Command&statusFailed != 0 }

// Append appends the argument, the 12 bytes behind the header. Bits of the LBA that the flags leave no room for are cut.
func (a *ATA) Append(b []byte) []byte {
	lba, device := a.LBA&maskLBA48, uint8(0)
	if a.Flags&ATAExtended == 0 {
		lba, device = a.LBA&maskLBA28, a.Device&0xF0
	}
	return append(b, uint8(a.Flags), a.Feature, a.Count, uint8(a.Command),
		uint8(lba), uint8(lba>>8), uint8(lba>>16), uint8(lba>>24)|device, uint8(lba>>32), uint8(lba>>40), 0, 0)
}

// ParseATA reads an ATA frame. data is all that follows the argument: with padding, it is longer than what the count says;
// it may also be shorter, which the caller must check against what it asked for. ErrShort, ErrCommand.
func ParseATA(frame []byte) (a ATA, data []byte, err error) {
	if err := argument(frame, CommandATA, ATABytes); err != nil {
		return a, nil, err
	}
	a = ATA{Flags: ATAFlags(frame[24]), Feature: frame[25], Count: frame[26], Command: ATACommand(frame[27])}
	for i := 5; i >= 0; i-- {
		a.LBA = a.LBA<<8 | uint64(frame[28+i])
	}
	if a.Flags&ATAExtended == 0 {
		a.LBA &= maskLBA28
		a.Device = frame[31] & 0xF0
	}
	return a, frame[ATABytes:], nil
}
