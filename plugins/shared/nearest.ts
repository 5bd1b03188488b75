/**
 * The candidate with the fewest edits (Levenshtein) from `word`, if it is close enough to be a slip of the finger:
 * at most a third of the longer word, rounded up.
 */
export function nearest(word: string, candidates: Iterable<string>): string | undefined {
  let best: string | undefined;
  let fewest = Infinity;
  for (const candidate of candidates) {
    const most = Math.ceil(Math.max(word.length, candidate.length) / 3);
    // At least as many edits as letters more: a word of a megabyte is told apart without a second of counting.
    if (Math.abs(word.length - candidate.length) > most) continue;
    const edits = distance(word.toLowerCase(), candidate.toLowerCase());
    if (edits < fewest && edits <= most) {
      best = candidate;
      fewest = edits;
    }
  }
  return best;
}

/** ` (did you mean "x"?)`, or nothing where no candidate is near. */
export function didYouMean(word: string, candidates: Iterable<string>): string {
  const near = nearest(word, candidates);
  return near === undefined ? "" : ` (did you mean "${near}"?)`;
}

function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const substitute = row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1);
      next[j] = Math.min(substitute, row[j] + 1, next[j - 1] + 1);
    }
    row = next;
  }
  return row[b.length];
}
