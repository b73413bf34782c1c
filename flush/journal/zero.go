package journal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
)

// Zero zeroes n bytes from off on, by the Zero of w if it has one that works, else by writing zeroes. It does not sync.
// progress, which may be nil, is told the bytes of every step.
func Zero(ctx context.Context, w io.WriterAt, off, n int64, progress func(n int64)) error {
	own, _ := w.(interface{ Zero(off, n int64) error })
	var zeroes []byte
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		step, err := min(n, zeroStepBytes), error(syscall.EOPNOTSUPP)
		if own != nil {
			err = own.Zero(off, step)
		}
		if errors.Is(err, syscall.EOPNOTSUPP) {
			own, step = nil, min(n, writeBytes)
			if zeroes == nil {
				zeroes = make([]byte, step)
			}
			err = writeFull(w, zeroes[:step], off)
		}
		if err != nil {
			return fmt.Errorf("zero %d bytes at %d: %w", step, off, err)
		}
		if progress != nil {
			progress(step)
		}
		off, n = off+step, n-step
	}
	return nil
}
