package host

import (
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// stopExtension is what a daemon asks for while it drains; it asks again each time that it reports progress.
const stopExtension = 60 * time.Second

// NotifyReady tells systemd that the daemon serves. Without systemd it does nothing, as all of these.
func NotifyReady(status string) { notify(daemon.SdNotifyReady + "\nSTATUS=" + status) }

// NotifyStopping tells systemd that the daemon has begun to stop.
func NotifyStopping(status string) { notify(daemon.SdNotifyStopping + "\nSTATUS=" + status) }

// NotifyDraining tells systemd how far a stop is, and that it may take longer.
func NotifyDraining(status string) {
	notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\nSTATUS=%s", stopExtension.Microseconds(), status))
}

// notify sends a datagram; nobody depends on its arrival but systemd, which then uses its timeouts.
func notify(state string) { _, _ = daemon.SdNotify(false, state) }
