//! The guest's side of a copy: a process of its agent, in the guest's own root.
//!
//! Invariants: what it says is bounded, and waited for with a limit; its end is always waited
//! for, and an end that is not its own doing is told with who ended it.

use std::io::{self, BufWriter, Read, Write};
use std::time::Duration;

use crossbeam_channel::{bounded, Receiver};

use super::super::running::{StreamReader, CHUNK};
use super::super::{Command, Error, Guest, Running};
use crate::tree::measure::Needs;
use crate::tree::Stop;
use crate::vm::identity;
use crate::worker::Worker;

/// Most bytes of the guest's complaint that are kept.
const COMPLAINT: u64 = 4096;
/// Most bytes of what it answers: a name of 255 bytes in digits, and a word.
const ANSWERS: u64 = 1024;
/// How long that complaint may take once its writer has ended.
const JOIN: Duration = Duration::from_secs(10);
/// How long the guest's side may do nothing: it reads or writes files of its own.
const STALLED: Duration = Duration::from_secs(120);
/// How long the guest's side may take to end once all bytes have gone.
const ENDING: Duration = Duration::from_secs(60);
/// The exit code of a process that signal 9 ended.
const KILLED: i32 = 128 + 9;
/// Where the kernel's count of such ends is among a container's figures.
const OOM_KILLS: &str = "oom_kill";

/// A process of the agent's.
pub struct Side<'a> {
    guest: &'a Guest,
    pub running: Running,
    name: String,
    complaint: Receiver<String>,
    stdout: io::BufReader<io::Take<StreamReader>>,
    full: Option<Full>,
}

/// How it ended.
pub struct Ended {
    pub code: i32,
    /// What it complained of.
    pub text: String,
    /// That its file system has too little room.
    pub full: Option<Full>,
}

/// A file system of the guest's that is full, as the guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Whether it is in the guest's memory.
    pub memory: bool,
    /// What is free.
    pub free: Needs,
    /// What it has in all.
    pub all: Needs,
}

impl Full {
    /// From the guest's line: `full KIND BYTES BYTES INODES INODES`.
    pub fn parse(line: &str) -> Option<Full> {
        let words: Vec<&str> = line.split(' ').collect();
        let ["full", kind, numbers @ ..] = words.as_slice() else { return None };
        let memory = match *kind {
            "memory" => true,
            "disk" => false,
            _ => return None,
        };
        let numbers: Vec<u64> = numbers.iter().map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let [bytes, all_bytes, inodes, all_inodes] = numbers[..] else { return None };
        Some(Full {
            memory,
            free: Needs { bytes, inodes },
            all: Needs { bytes: all_bytes, inodes: all_inodes },
        })
    }
}

impl<'a> Side<'a> {
    /// Starts the agent's program. Always in the guest's own root: that is where it is.
    pub fn start(guest: &'a Guest, command: &Command) -> Result<Side<'a>, Error> {
        let fresh = identity::uuid().map_err(|source| Error::Io {
            during: "take",
            path: "random bytes".into(),
            source,
        })?;
        let name = format!("copy-{}", &fresh[..8]);
        // That the guest has lost the program is no word on a user's command.
        let lost = |e| match e {
            Error::NotFound { text } | Error::NotExecutable { text } => {
                Error::Copy { text: format!("start the guest's side of the copy: {text}") }
            }
            e => e,
        };
        let running = guest.launch_beside(command, &name).map_err(lost)?.limited(STALLED);
        let complaint = complaints(&running)?;
        let stdout = io::BufReader::new(running.stdout().take(ANSWERS));
        Ok(Side { guest, running, name, complaint, stdout, full: None })
    }

    /// The next line that it answers; `None` when there is none, or none that is whole. That
    /// it is full is kept until its end.
    pub fn answer(&mut self) -> Option<String> {
        use io::BufRead;
        let mut line = Vec::new();
        self.stdout.read_until(b'\n', &mut line).ok()?;
        let line = String::from_utf8(line).ok()?.strip_suffix('\n')?.to_string();
        self.full = self.full.or(Full::parse(&line));
        Some(line)
    }

    /// Ends it, because of something on this host.
    pub fn kill(&self) {
        let _ = self.running.signal(9);
    }

    /// Writes to its standard input, closes that, and waits for its end.
    ///
    /// # Errors
    /// What `write` says of this host; else why the guest's side did not take it all.
    pub fn feed(
        self,
        stop: &Stop,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<(), Error>,
    ) -> Result<Ended, Error> {
        let out = BufWriter::with_capacity(CHUNK, self.running.stdin());
        let mut sink = Sink { out, stop, failed: None };
        let written = write(&mut sink);
        let written = match (written, &sink.failed) {
            (Ok(()), None) => {
                let _ = sink.flush();
                Ok(())
            }
            (written, _) => written,
        };
        let Sink { out, failed, .. } = sink;
        // Its drop closes the guest's standard input. What this host could not go on with ends
        // there in the middle: the guest's side takes back the file that it was at.
        drop(out.into_parts());
        let ended = self.finish(false);
        match (written, failed, ended) {
            (Err(e), None, _) => Err(e),
            (Ok(()), None, ended) => ended,
            (_, Some(_), Err(e)) => Err(e),
            (_, Some(_), Ok(ended)) if ended.code != 0 => Ok(ended),
            (_, Some(why), Ok(_)) => Err(Error::Copy {
                text: format!("the guest's side ended before it had all of the stream: {why}"),
            }),
        }
    }

    /// Waits for its end; one that does not end is killed. `taken` says that its standard
    /// output was read by somebody else.
    ///
    /// # Errors
    /// When nothing is known of its end.
    pub fn finish(mut self, taken: bool) -> Result<Ended, Error> {
        let ended = self.running.wait_within(ENDING);
        if let Some(why) = self.running.given_up() {
            return Err(why);
        }
        let code = match ended {
            Ok(code) => code,
            Err(ended @ Error::Ended { .. }) => return Err(ended),
            Err(e) => {
                self.kill();
                let text = format!(
                    "the guest's side has not ended {} s after all bytes had gone, and was killed \
                     ({})",
                    ENDING.as_secs(),
                    crate::report::chain(&e)
                );
                return Err(Error::Copy { text });
            }
        };
        let mut text = self.complaint.recv_timeout(JOIN).unwrap_or_default();
        if code != 0 && !taken && self.full.is_none() {
            let _ = self.answer();
        }
        match code {
            0 if !text.is_empty() => log::warn!("the guest's side of the copy: {text}"),
            0 => {}
            _ if text.is_empty() => text = self.end_of(code),
            _ => {}
        }
        let _ = self.guest.remove(&self.name);
        Ok(Ended { code, text, full: self.full })
    }

    /// An end without a word. It was not killed from here: then something else is told.
    fn end_of(&self, code: i32) -> String {
        let (signal, oom) = (code - 128, code == KILLED && self.oom_kills() > 0);
        match code {
            _ if oom => "the guest's kernel ended the guest's side (SIGKILL): it has no memory \
                         left (OOM); use a VM of more, with --memory"
                .into(),
            129..=192 => format!(
                "the guest's side was ended by signal {signal}, which something in the guest sent"
            ),
            _ => format!("the guest's side ended with code {code}, and said nothing"),
        }
    }

    /// How often the guest's kernel has ended a process of this container for want of memory.
    fn oom_kills(&self) -> u64 {
        let stats = self.guest.agent().stats_container(&self.name).unwrap_or_default();
        let memory = stats.cgroup_stats.as_ref().and_then(|c| c.memory_stats.as_ref());
        memory.and_then(|m| m.stats.get(OOM_KILLS)).copied().unwrap_or(0)
    }
}

/// The guest's standard input; remembers that it was this that failed, and nothing of this
/// host's.
struct Sink<'a, W: Write> {
    out: W,
    stop: &'a Stop,
    failed: Option<String>,
}

impl<W: Write> Sink<'_, W> {
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(e) = &result {
            self.failed.get_or_insert_with(|| e.to_string());
        }
        result
    }
}

impl<W: Write> Write for Sink<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stop.check().map_err(io::Error::other)?;
        let written = self.out.write(bytes);
        self.note(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.out.flush();
        self.note(flushed)
    }
}

/// What the guest's side complains of, once: when it ends, or has said enough.
fn complaints(running: &Running) -> Result<Receiver<String>, Error> {
    let mut stderr = running.stderr();
    let (tell, complaint) = bounded(1);
    Worker::spawn("vmc-stderr", move || {
        let mut text = Vec::new();
        let _ = (&mut stderr).take(COMPLAINT).read_to_end(&mut text);
        let _ = tell.send(String::from_utf8_lossy(&text).trim().to_string());
        // One that never ends holds up nobody but its writer.
        while stderr.next_chunk().is_ok_and(|c| !c.is_empty()) {}
    })
    .map(|_| complaint)
    .map_err(|e| Error::Copy { text: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_system_is_told_by_numbers_alone() {
        let full = Full::parse("full memory 1 2 3 4").unwrap();
        assert!(full.memory);
        assert_eq!((full.free.bytes, full.all.bytes), (1, 2));
        assert_eq!((full.free.inodes, full.all.inodes), (3, 4));
        for line in ["", "full", "full memory 1 2 3", "full tape 1 2 3 4", "full disk -1 2 3 4"] {
            assert_eq!(Full::parse(line), None, "{line}");
        }
    }
}
