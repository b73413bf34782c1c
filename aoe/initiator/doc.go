// Package initiator uses an AoE target as a disk.
//
// Machine is all of the protocol, without goroutines, clocks and sockets. Initiator runs one over Wires. AoE itself has neither
// connections nor order nor retransmission; all of that is here.
package initiator
