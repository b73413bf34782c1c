package control

import "fmt"

// ExitCode is how a verb ends; scripts rely on it (docs/OPERATIONS.md, "Exit codes").
type ExitCode int

// The exit codes. 2 is left to Go's panic.
const (
	ExitDone        ExitCode = 0
	ExitFailed      ExitCode = 1
	ExitUnreachable ExitCode = 3  // no daemon answers on the control socket
	ExitNoVolume    ExitCode = 4  // the daemon serves no volume of that name
	ExitRefused     ExitCode = 5  // refused for safety; the hint says how to force it
	ExitUsage       ExitCode = 64 // wrong usage
)

// Failure is an error with the exit code that it ends in and, where a next step is known, a hint for the
// operator. Any part of the daemon may return one; it crosses the control socket.
type Failure struct {
	Code ExitCode
	Err  error
	Hint string // without a full stop; empty where no next step is known
}

// Error is the text of the cause, without the hint.
func (f *Failure) Error() string { return f.Err.Error() }

// Unwrap gives the cause.
func (f *Failure) Unwrap() error { return f.Err }

// Refused makes a Failure of something that was refused for safety. The hint says how to force it.
func Refused(err error, hint string) *Failure {
	return &Failure{Code: ExitRefused, Err: err, Hint: hint}
}

// Usage makes a Failure of wrong usage.
func Usage(hint, format string, args ...any) *Failure {
	return &Failure{Code: ExitUsage, Err: fmt.Errorf(format, args...), Hint: hint}
}

// Later makes a Failure of something that is a name of the interface but has no function yet.
func Later(what string) *Failure {
	return &Failure{Code: ExitFailed, Err: fmt.Errorf("%s: lands later", what)}
}
