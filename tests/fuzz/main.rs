//! Bytes from outside, on stable Rust: what lies in `corpus`, and what mutation makes
//! of it, for a second or two each; `VMCACHE_FUZZ=N` for N seconds.
//!
//! The same entry points as libFuzzer's: `cargo fuzz run TARGET --fuzz-dir tests/fuzz`
//! (or `--sanitizer none` without nightly), which finds its way by what was reached;
//! this one is blind, and in CI. A panic, of any thread, ends it with the input in a
//! file; so do memory beyond a target's bound, and seconds over one input.

// Tests start threads, and print what they find.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vmcache::fuzzing::{Target, MAX_INPUT, TARGETS};

/// Seconds for each target, unless it is said.
const SHORT: u64 = 2;
/// Longest that one input may take.
const SLOW: Duration = Duration::from_secs(5);

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is left to the system's allocator; sizes are counted beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What is being read: for whoever panics.
static INPUT: Mutex<(String, Vec<u8>)> = Mutex::new((String::new(), Vec::new()));

/// Puts the input where it can be run again, and ends.
fn found(what: &str) -> ! {
    let (target, input) = &*INPUT.lock().unwrap_or_else(|e| e.into_inner());
    let path = std::env::temp_dir().join(format!("vmcache-fuzz-{target}.bin"));
    let kept = fs::write(&path, input);
    eprintln!("{target}: {what}: {} bytes in {} ({kept:?})", input.len(), path.display());
    println!("\ntest result: FAILED. 0 passed; 1 failed; 0 ignored");
    std::process::exit(1);
}

/// Numbers that are as random as this needs.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Some of what it was, changed in one to eight places.
    fn mutated(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len() + 1);
            match self.below(8) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.next() as u8,
                // Lengths: the interesting ones.
                2 if at + 4 <= bytes.len() => {
                    let numbers = [0, 1, 7, 11, 12, 0xff, 0xffff, 0x10_0000, 0x7fff_ffff, u32::MAX];
                    let n = numbers[self.below(numbers.len())];
                    let n = if self.below(2) == 0 { n.to_be_bytes() } else { n.to_le_bytes() };
                    bytes[at..at + 4].copy_from_slice(&n);
                }
                3 => bytes.truncate(at),
                4 => {
                    let more: Vec<u8> = (0..self.below(64)).map(|_| self.next() as u8).collect();
                    bytes.splice(at..at, more);
                }
                // A piece of it again, or of another.
                5 => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len() + 1);
                    let to = from + self.below(other.len() - from + 1);
                    bytes.splice(at..at, other[from..to].iter().copied());
                }
                6 => {
                    let to = at + self.below(bytes.len() - at + 1);
                    bytes.drain(at..to);
                }
                _ => {
                    let words: [&[u8]; 8] =
                        [b"{", b"\"", b"[", b"\n", b"-1", b"1e999", b"null", b"\xff\xfe"];
                    bytes.splice(at..at, words[self.below(words.len())].iter().copied());
                }
            }
        }
        bytes.truncate(MAX_INPUT);
        bytes
    }
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no corpus in {}", dir.display());
    paths.iter().map(|p| fs::read(p).unwrap()).collect()
}

fn once(target: &Target, bytes: &[u8]) -> usize {
    *INPUT.lock().unwrap() = (target.name.to_string(), bytes.to_vec());
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let start = Instant::now();
    (target.run)(bytes);
    let (took, peak) = (start.elapsed(), PEAK.load(Ordering::Relaxed).saturating_sub(before));
    if took > SLOW {
        found(&format!("it took {:.1} s", took.as_secs_f64()));
    }
    if peak > target.most {
        found(&format!("it took {peak} bytes of memory, over {}", target.most));
    }
    peak
}

fn main() -> ExitCode {
    let seconds = std::env::var("VMCACHE_FUZZ").ok().map_or(SHORT, |n| n.parse().unwrap());
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if let [target, file] = &words[..] {
        // One input again.
        let target = TARGETS.iter().find(|t| t.name == target).expect("no such target");
        once(target, &fs::read(file).unwrap());
        return ExitCode::SUCCESS;
    }
    std::panic::set_hook(Box::new(|info| found(&info.to_string())));
    println!("| bytes of | inputs | of them in the corpus | most memory, KiB |\n|---|---|---|---|");
    let mut passed = 0;
    for target in &TARGETS {
        if !words.is_empty() && !words.iter().any(|w| target.name.contains(w.as_str())) {
            continue;
        }
        let corpus = corpus(target.name);
        let mut dice = Dice(0x2545_f491_4f6c_dd1d);
        let mut most = corpus.iter().map(|bytes| once(target, bytes)).max().unwrap_or(0);
        let (mut inputs, until) = (corpus.len(), Instant::now() + Duration::from_secs(seconds));
        while Instant::now() < until {
            most = most.max(once(target, &dice.mutated(&corpus)));
            inputs += 1;
        }
        println!("| {} | {inputs} | {} | {} |", target.name, corpus.len(), most >> 10);
        passed += 1;
    }
    println!("\ntest result: ok. {passed} passed; 0 failed; 0 ignored");
    ExitCode::SUCCESS
}
