package journal

// regionsPerPage is how many bits a page of the intent bitmap holds.
const regionsPerPage = (BlockBytes - 64 - 4) * 8
