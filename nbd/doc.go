// Package nbd speaks the NBD protocol on both sides: a server for devices of any kind, and a client that is a
// backing and a load generator. It knows bytes, offsets and promises of the protocol, not what a block means.
//
// A Server serves Exports to clients over TCP and unix sockets. An Export is a Device, declared here by what the
// server needs of it, under a name. Every connection has a reader, which parses all requests that have arrived,
// gives them to the device and sends the replies that are ready in one gathered write, and a writer for what is
// answered later or does not fit the socket; the reader never waits for the client to read. A Request is used
// again when its reply has left, so a request allocates nothing.
//
// Sources: the NBD project's doc/proto.md (master, and branch extension-ext-header for extended headers) and
// doc/uri.md. Our own option, OptSession, is described at its type and in docs/FORMAT.md.
package nbd
