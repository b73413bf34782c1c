// Package bench holds what every measurement of a whole system needs: latency histograms, medians with their
// spread, tables, the facts of the host, the cost of a server process, and the marked sections of a report.
//
// The load generator is in bench/load, the null server that shows what a machine allows in bench/floor, and
// the comparison with other servers in bench/compare.
package bench
