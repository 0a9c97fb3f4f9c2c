//! A test that never ends fails the run, by name, instead of standing still with it.
//!
//! Tests end by what they wait for; this is for the wait that nobody has thought of. Rust's
//! tests have a thread each: a value of the thread's own tells when it is over.

use std::fs;
use std::io::{self, Write};
use std::sync::{Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

/// Longer than any test takes on a busy machine: the longest boots VMs inside a VM, for at
/// most 1800 s.
const LONGEST: Duration = Duration::from_secs(1900);
/// Environment variable: other seconds, fewer to see it happen, more for `tests/soak`.
const OTHER: &str = "VMCACHE_TEST_LONGEST";

static RUNNING: Mutex<Vec<(String, Instant)>> = Mutex::new(Vec::new());
static WATCHED: Once = Once::new();

/// This thread's test, from its start to the thread's end.
struct Test(String);

impl Drop for Test {
    fn drop(&mut self) {
        RUNNING.lock().unwrap().retain(|(name, _)| *name != self.0);
    }
}

thread_local! {
    static THIS: Test = {
        let name = thread::current().name().unwrap_or("a test").to_string();
        RUNNING.lock().unwrap().push((name.clone(), Instant::now()));
        Test(name)
    };
}

/// Counts this thread's test from now on.
pub fn begin() {
    THIS.with(|_| ());
    WATCHED.call_once(|| {
        let other = std::env::var(OTHER).ok().and_then(|t| t.parse().ok());
        let longest = other.map_or(LONGEST, Duration::from_secs);
        thread::spawn(move || loop {
            thread::sleep(Duration::from_secs(1));
            let running = RUNNING.lock().unwrap();
            if let Some((name, _)) = running.iter().find(|(_, since)| since.elapsed() > longest) {
                give_up(name, longest);
            }
        });
    });
}

/// Names the test and what this process has started, and ends all of it.
fn give_up(name: &str, longest: Duration) -> ! {
    // Not by eprintln!, which goes to the output of a test, and is lost with it.
    let mut out = io::stderr();
    let _ = writeln!(out, "test {name} has not ended after {} s; what runs:", longest.as_secs());
    for pid in children() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let _ = writeln!(out, "{pid:>8} {line}");
        let _ = kill(pid, Signal::SIGTERM);
    }
    std::process::exit(101);
}

fn children() -> Vec<Pid> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.map(|t| fs::read_to_string(t.path().join("children")).unwrap_or_default());
    let pids = lists.flat_map(|l| l.split_whitespace().map(str::to_string).collect::<Vec<_>>());
    pids.filter_map(|p| p.parse().ok()).map(Pid::from_raw).collect()
}
