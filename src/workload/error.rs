//! Why nothing was run or copied, in words that say what to do.

use std::error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::files::Full;
use crate::agent;
use crate::tree;
use crate::tree::measure::Needs;
use crate::vm::attach;

/// Why a command could not be run, or files not be copied.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The agent refused or did not answer.
    Agent(agent::Error),
    /// The program does not exist in the guest.
    NotFound { text: String },
    /// The program can not be executed.
    NotExecutable { text: String },
    /// The command can not be run like this, by nobody.
    Command { text: String },
    /// There is no such command in the VM, or none any more.
    NoCommand { vm: String, exec: Option<String> },
    /// Local files.
    Tree(tree::Error),
    /// What was to be attached is not there, or QEMU did not take it.
    Attach(attach::Error),
    /// The local system.
    Io { during: &'static str, path: PathBuf, source: io::Error },
    /// The guest's side of a copy failed.
    Copy { text: String },
    /// A copy does not fit the guest's file system: what it needs, if that is known, and what
    /// the guest's side says there is, in a VM of so much memory.
    Full { text: String, needs: Option<Needs>, full: Full, memory_mib: u32 },
    /// The guest's agent runs nothing in its own root.
    NeedsRoot,
    /// The guest answers nothing any more.
    Silent { vm: String, after: Duration },
    /// QEMU has stopped the VM, which does not go on by itself; QEMU's word for it.
    Stopped { vm: String, status: String },
    /// The guest's side of a copy does nothing any more, though its agent answers.
    Stalled { vm: String, after: Duration },
    /// The VM has ended: its QEMU is gone.
    Ended { vm: String },
    /// Somebody asked for a copy's end.
    Interrupted,
    /// The guest could not be had to write out its disks before the VM's end.
    Unwritten { text: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Agent(_) => f.write_str("run in the VM"),
            Error::NotFound { text } | Error::NotExecutable { text } | Error::Command { text } => {
                f.write_str(text)
            }
            Error::NoCommand { vm, exec: None } => write!(
                f,
                "no command of `vmcache run` runs in VM {vm}: `vmcache ps {vm}` lists those of \
                 `exec`, for --exec"
            ),
            Error::NoCommand { vm, exec: Some(exec) } => {
                write!(
                    f,
                    "no command {exec:?} runs in VM {vm}: `vmcache ps {vm}` lists those that do"
                )
            }
            Error::Tree(_) => f.write_str("copy files"),
            // Its own text says it all.
            Error::Attach(e) => e.fmt(f),
            Error::Io { during, path, .. } => write!(f, "{during} {}", path.display()),
            Error::Copy { text } => write!(f, "copy files: {text}"),
            Error::Full { text, needs, full, memory_mib } => {
                does_not_fit(f, text, *needs, full, *memory_mib)
            }
            Error::NeedsRoot => f.write_str(
                "the guest's agent is not vmcache's own, and runs commands only in a root that is \
                 brought along: use --rootfs DIR",
            ),
            Error::Ended { vm } => write!(
                f,
                "VM {vm} has ended: it was stopped, its guest shut down, or its QEMU was killed"
            ),
            Error::Silent { vm, after } => {
                write!(f, "the guest of VM {vm} has not answered for {} s", after.as_secs())
            }
            Error::Stopped { vm, status } => {
                write!(f, "VM {vm} does not run any more: QEMU has stopped it ({status})")
            }
            Error::Stalled { vm, after } => write!(
                f,
                "the guest of VM {vm} answers, but its side of the copy has done nothing for {} s",
                after.as_secs()
            ),
            Error::Interrupted => f.write_str("interrupted"),
            Error::Unwritten { text } => {
                write!(f, "its disks may lack what the guest wrote last: {text}")
            }
        }
    }
}

/// Sizes, and what to do. In memory, a file system grows with its VM's.
fn does_not_fit(
    f: &mut fmt::Formatter<'_>,
    text: &str,
    needs: Option<Needs>,
    full: &Full,
    memory_mib: u32,
) -> fmt::Result {
    match needs {
        Some(n) => write!(
            f,
            "copy files: {} ({} files) do not fit the guest, which",
            size(n.bytes),
            n.inodes
        )?,
        None => write!(f, "copy files: the guest is full ({text}), and")?,
    }
    write!(f, " has {} of {} free", size(full.free.bytes), size(full.all.bytes))?;
    if full.all.inodes < u64::MAX {
        write!(f, " and {} of {} inodes", full.free.inodes, full.all.inodes)?;
    }
    if !full.memory {
        return f.write_str(" on a disk of its own: make room, or use a larger image");
    }
    write!(f, ", in a VM of {memory_mib} MiB: claim one of more, by `get` or `run` ")?;
    match needs.and_then(|n| enough(n, full, memory_mib)) {
        Some(mib) => write!(f, "with `--memory {mib}`")?,
        None => f.write_str("with `--memory MIB`")?,
    }
    f.write_str(", or bring it as a disk, by `run` with `--image FILE`")
}

/// A tenth more than what was measured needs: others write, too.
const MARGIN: u128 = 10;
/// Sizes of VMs are told in steps of so many MiB.
const STEP: u128 = 64;

/// The memory with which it fits: file systems have the same part of it as now.
fn enough(needs: Needs, full: &Full, memory_mib: u32) -> Option<u32> {
    let of = |needs: u64, free: u64, all: u64| {
        let wanted = u128::from(all.saturating_sub(free)) + u128::from(needs);
        let wanted = wanted + wanted / MARGIN;
        match all {
            0 | u64::MAX => 0,
            all => (wanted * u128::from(memory_mib)).div_ceil(u128::from(all)),
        }
    };
    let mib = of(needs.bytes, full.free.bytes, full.all.bytes).max(of(
        needs.inodes,
        full.free.inodes,
        full.all.inodes,
    ));
    u32::try_from(mib.max(u128::from(memory_mib) + 1).next_multiple_of(STEP)).ok()
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match bytes {
        0..1_048_576 => format!("{:.1} KiB", mib * 1024.0),
        _ => format!("{mib:.1} MiB"),
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Agent(e) => Some(e),
            Error::Tree(e) => Some(e),
            Error::Attach(e) => e.source(),
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Error {
    /// The VM that is of no use any more, as far as this can be told from here.
    pub fn lost_vm(&self) -> Option<&str> {
        match self {
            Error::Silent { vm, .. } | Error::Stopped { vm, .. } | Error::Stalled { vm, .. } => {
                Some(vm)
            }
            _ => None,
        }
    }
}

/// CreateContainer and ExecProcess tell by these codes that the program itself
/// is the matter.
pub(super) fn start_error(e: agent::Error) -> Error {
    match e {
        agent::Error::Refused { code: ttrpc::Code::NOT_FOUND, text, .. } => {
            Error::NotFound { text }
        }
        agent::Error::Refused { code: ttrpc::Code::PERMISSION_DENIED, text, .. } => {
            Error::NotExecutable { text }
        }
        other => Error::Agent(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_with_sizes_and_what_to_do() {
        let needs = Needs { bytes: 238 << 20, inodes: 27_796 };
        let free = Needs { bytes: 100 << 20, inodes: 30_000 };
        let all = Needs { bytes: 128 << 20, inodes: 32_768 };
        let full = Full { memory: true, free, all };
        let told = |needs, full| {
            let text = "in /: unpack a: No space left on device (os error 28)".into();
            Error::Full { text, needs, full, memory_mib: 256 }.to_string()
        };
        let text = told(Some(needs), full);
        for part in ["238.0 MiB (27796 files)", "100.0 MiB of 128.0 MiB free", "256 MiB"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // (28 + 238) MiB and a tenth, of which a VM has twice as much.
        assert!(text.contains("`--memory 640`") && text.contains("--image"), "{text}");
        let many = Needs { bytes: 1, inodes: 300_000 };
        assert_eq!(enough(many, &full, 256), Some(2624));
        let text = told(None, full);
        assert!(text.contains("os error 28") && text.contains("`--memory MIB`"), "{text}");
        let text = told(Some(needs), Full { memory: false, ..full });
        assert!(text.contains("larger image") && !text.contains("--memory"), "{text}");
        // A guest's numbers may be any.
        let nothing = Needs::default();
        let most = Needs { bytes: u64::MAX, inodes: u64::MAX };
        for (free, all) in [(most, nothing), (nothing, most), (most, most), (nothing, nothing)] {
            told(Some(most), Full { memory: true, free, all });
        }
    }
}
