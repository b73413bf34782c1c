// Package load generates load on an NBD server at as little cost per request as a client can have: requests
// leave in batches with one system call, replies are taken as many at a time as have arrived, payloads are
// looked at only where that is asked for, and nothing is allocated per request. So the figures are the
// server's and the socket's, and not the client's.
//
// It speaks the protocol in its own few bytes and shares no code with the server or client under test.
package load
