package cache

import (
	"sync"
	"sync/atomic"
)

// queue holds operations that wait for slots, first come first served. Its length is bounded by what the connections may
// have in flight.
type queue struct {
	mu     sync.Mutex
	list   opList
	length atomic.Int32
	wake   chan struct{}
}

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1)} }

func (q *queue) empty() bool { return q.length.Load() == 0 }

func (q *queue) push(op *Op) {
	q.mu.Lock()
	q.list.push(op)
	q.length.Add(1)
	q.mu.Unlock()
	q.signal()
}

// pop takes the first operation out; it still counts in length.
func (q *queue) pop() *Op {
	q.mu.Lock()
	defer q.mu.Unlock()
	op := q.list.head
	if op != nil {
		q.list.head = op.next
		op.next = nil
	}
	return op
}

func (q *queue) putBack(op *Op) {
	q.mu.Lock()
	defer q.mu.Unlock()
	op.next = q.list.head
	if q.list.head == nil {
		q.list.tail = op
	}
	q.list.head = op
}

// kick says that there may be room again.
func (q *queue) kick() {
	if q.length.Load() > 0 {
		q.signal()
	}
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// run starts the operations of the queue, in order, whenever there may be room, until stop is closed.
func (q *queue) run(stop <-chan struct{}, try func(*Op) bool) {
	for {
		select {
		case <-stop:
			return
		case <-q.wake:
		}
		for op := q.pop(); op != nil; op = q.pop() {
			// It counts until it is started, so that no kick is lost meanwhile.
			if !try(op) {
				q.putBack(op)
				break
			}
			q.length.Add(-1)
		}
	}
}
