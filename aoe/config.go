package aoe

import "encoding/binary"

// ConfigCommand is what a config frame asks for.
type ConfigCommand uint8

// Config commands.
const (
	ConfigRead   ConfigCommand = 0
	ConfigMatch  ConfigCommand = 1 // answered only where the string is the same
	ConfigPrefix ConfigCommand = 2 // answered only where the string begins with it
	ConfigSet    ConfigCommand = 3 // if the target has none
	ConfigForce  ConfigCommand = 4
)

// Config is the argument of a config frame.
type Config struct {
	Buffers  uint16 // requests that the target holds; further ones are dropped
	Firmware uint16
	Sectors  uint8 // at most in a frame; 0 means 2
	Version  uint8 // of the protocol
	Command  ConfigCommand
	String   []byte // at most MaxConfigBytes
}

// MaxSectorsPerFrame is how many sectors the target takes in a frame.
func (c *Config) MaxSectorsPerFrame() int {
	if c.Sectors == 0 {
		return 2
	}
	return int(c.Sectors)
}

// Append appends the argument and the string. ErrLength, with b unchanged, where the string is too long.
func (c *Config) Append(b []byte) ([]byte, error) {
	if len(c.String) > MaxConfigBytes {
		return b, ErrLength
	}
	b = binary.BigEndian.AppendUint16(b, c.Buffers)
	b = binary.BigEndian.AppendUint16(b, c.Firmware)
	b = append(b, c.Sectors, c.Version<<4|uint8(c.Command&0x0F))
	b = binary.BigEndian.AppendUint16(b, uint16(len(c.String)))
	return append(b, c.String...), nil
}

// ParseConfig reads a config frame. The string refers into the frame. ErrShort, ErrCommand, ErrLength.
func ParseConfig(frame []byte) (c Config, err error) {
	if err := argument(frame, CommandConfig, ConfigBytes); err != nil {
		return c, err
	}
	n := int(binary.BigEndian.Uint16(frame[30:]))
	switch {
	case n > MaxConfigBytes:
		return c, ErrLength
	case n > len(frame)-ConfigBytes:
		return c, ErrShort
	}
	return Config{
		Buffers:  binary.BigEndian.Uint16(frame[24:]),
		Firmware: binary.BigEndian.Uint16(frame[26:]),
		Sectors:  frame[28],
		Version:  frame[29] >> 4,
		Command:  ConfigCommand(frame[29] & 0x0F),
		String:   frame[ConfigBytes : ConfigBytes+n],
	}, nil
}
