//! Guests whose agent is Kata's own, which can do less than ours: it has no root
//! to share with a command, no tar, no user names.
//!
//! Invariants: no command is run in the guest's own root, whose agent would not
//! survive it; files come by CopyFile, below the one directory where Kata's agents
//! take them.
//!
//! Does not: bring devices, sockets and hard links of a root file system along.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::stat::SFlag;

use super::{Error, Guest};
use crate::agent;
use crate::ids::{halves, named, Named};
use crate::proto::agent::CopyFileRequest;
use crate::proto::oci::{LinuxCapabilities, LinuxResources, Process, Spec, User};
use crate::tree::{self, walk, MAX_DEPTH};

/// Where a root file system from the host is in the guest.
pub const ROOT: &str = "/run/kata-containers/main/rootfs";
/// Bytes of a file in one call: what Kata's runtimes send.
const PIECE: u64 = 1024 * 1024;
/// All that Linux 3.16 knew: the VM is what isolates, and an agent may know no more.
const CAPABILITIES: [&str; 37] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
];
/// Mounts that Kata's agents make themselves, or not at all.
const NOT_THEIRS: &str = "/sys/fs/cgroup";

/// Copies a directory's contents to [`ROOT`].
pub fn send_root(guest: &Guest, source: &Path) -> Result<(), Error> {
    if !source.is_dir() {
        let text = "a guest with an agent of Kata's takes a directory as its root, no archive";
        return Err(Error::Copy { text: text.into() });
    }
    guest.start_sandbox()?;
    let failed = |source_error| failed(source, source_error);
    let dir = walk::open_named(source).map_err(failed)?;
    send_directory(guest, dir.as_fd(), source, Path::new(ROOT), 0)
}

fn failed(path: &Path, source: std::io::Error) -> Error {
    Error::Io { during: "read", path: path.into(), source }
}

/// Sends what is in an open directory; `source` is its name for messages.
fn send_directory(
    guest: &Guest,
    dir: BorrowedFd<'_>,
    source: &Path,
    target: &Path,
    depth: usize,
) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::Tree(tree::Error::Deep { path: source.into() }));
    }
    for name in walk::names(dir).map_err(|e| failed(source, e))? {
        send(guest, (dir, &name), &source.join(&name), &target.join(&name), depth)?;
    }
    Ok(())
}

/// Sends one name of an open directory.
fn send(
    guest: &Guest,
    (dir, name): (BorrowedFd<'_>, &OsStr),
    path: &Path,
    target: &Path,
    depth: usize,
) -> Result<(), Error> {
    let failed = |source| failed(path, source);
    let seen = walk::look(dir, name).map_err(failed)?;
    let request = CopyFileRequest {
        path: target.to_string_lossy().into_owned(),
        file_mode: seen.st_mode,
        dir_mode: 0o755,
        uid: seen.st_uid as i32,
        gid: seen.st_gid as i32,
        ..CopyFileRequest::default()
    };
    let copy = |r: CopyFileRequest| guest.watched.call(|agent| agent.copy_file(r));
    match walk::kind(&seen) {
        SFlag::S_IFDIR => {
            let opened = walk::open_directory(dir, name, &seen).map_err(failed)?;
            // Agents of 1.x make directories with the files in them, and take no others.
            if guest.agent().kind() == crate::agent::Kind::Kata {
                copy(request)?;
            }
            send_directory(guest, opened.as_fd(), path, target, depth + 1)
        }
        SFlag::S_IFLNK => {
            let data = walk::read_link(dir, name).map_err(failed)?.as_bytes().to_vec();
            copy(CopyFileRequest { file_size: data.len() as i64, data, ..request })
        }
        SFlag::S_IFREG => {
            let (mut file, stat) = walk::open_file(dir, name, &seen).map_err(failed)?;
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            let mut offset = 0;
            loop {
                let mut data = Vec::new();
                let piece = PIECE.min(size - offset);
                (&mut file).take(piece).read_to_end(&mut data).map_err(failed)?;
                let n = data.len() as u64;
                if n == 0 && offset < size {
                    let path = path.to_path_buf();
                    return Err(Error::Tree(tree::Error::Shrunk { path, size, read: offset }));
                }
                let (file_size, at) = (size as i64, offset as i64);
                copy(CopyFileRequest { file_size, offset: at, data, ..request.clone() })?;
                offset += n;
                if offset >= size {
                    return Ok(());
                }
            }
        }
        _ => Ok(()),
    }
}

/// Changes a specification to what Kata's agents understand.
///
/// # Errors
/// [`Error::Command`] with what they do not: a user by name.
pub fn adapt(spec: &mut Spec) -> Result<(), Error> {
    spec.Mounts.retain(|m| m.destination != NOT_THEIRS);
    if let Some(process) = spec.Process.as_mut() {
        adapt_process(process)?;
    }
    if let Some(linux) = spec.Linux.as_mut() {
        linux.CgroupsPath = "/vmcache/main".into();
        linux.Resources = Some(LinuxResources::default()).into();
    }
    Ok(())
}

/// The same for one process: agents of Kata's refuse one without capabilities, and
/// those of 1.x end.
pub fn adapt_process(process: &mut Process) -> Result<(), Error> {
    process.User = Some(numbers(&process.User.Username)?).into();
    let all = CAPABILITIES.map(String::from).to_vec();
    let capabilities = LinuxCapabilities {
        Bounding: all.clone(),
        Effective: all.clone(),
        Inheritable: all.clone(),
        Permitted: all,
        ..LinuxCapabilities::default()
    };
    process.Capabilities = Some(capabilities).into();
    Ok(())
}

/// Why a process was not started: Kata's agents have one code for all, and tell by their
/// text that the program is the matter.
///
/// Those of 2.x and later find a program that may not be executed only after they have said
/// that it runs: it then ends with code 13, the errno (`do_exec` of rustjail's container.rs).
pub(super) fn start_error(e: agent::Error) -> Error {
    let agent::Error::Refused { text, .. } = &e else { return Error::Agent(e) };
    match program_matter(text) {
        Some(Matter::Missing) => Error::NotFound { text: text.clone() },
        Some(Matter::NotExecutable) => Error::NotExecutable { text: text.clone() },
        None => Error::Agent(e),
    }
}

#[derive(Debug, PartialEq)]
enum Matter {
    Missing,
    NotExecutable,
}

/// Sources: `do_init_child` of rustjail's container.rs in kata-containers 2.0 to 4.1 ("the
/// file X was not found"); Go's `exec.LookPath`, as libcontainer of agent 1.13 passes its
/// error on (`exec: "X": executable file not found in $PATH`, `permission denied`).
fn program_matter(text: &str) -> Option<Matter> {
    let first = text.lines().next().unwrap_or_default();
    if first.starts_with("the file ") && first.ends_with(" was not found") {
        return Some(Matter::Missing);
    }
    let (_, looked_up) = text.split_once("exec: ")?;
    let says = |what: &str| looked_up.contains(what);
    if says("executable file not found in $PATH") || says("no such file or directory") {
        return Some(Matter::Missing);
    }
    says("permission denied").then_some(Matter::NotExecutable)
}

/// `user[:group]` in numbers.
fn numbers(text: &str) -> Result<User, Error> {
    let (user, group) = halves(text);
    let number = |what, given: Option<&str>| match given.map(|t| named(what, t)).transpose() {
        Ok(None) => Ok(0),
        Ok(Some(Named::Number(n))) => Ok(n),
        Ok(Some(Named::Name(_))) => Err(Error::Command {
            text: format!("user {text:?}: an agent of Kata's knows users and groups by number"),
        }),
        Err(text) => Err(Error::Command { text }),
    };
    Ok(User { UID: number("user", user)?, GID: number("group", group)?, ..User::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_tells_that_the_program_is_the_matter() {
        let go = |why: &str| {
            format!(
                "Could not run process: container_linux.go:349: starting container process \
                 caused \"exec: \\\"/x\\\": {why}\""
            )
        };
        for (text, matter) in [
            ("the file nope was not found".to_string(), Some(Matter::Missing)),
            (go("executable file not found in $PATH"), Some(Matter::Missing)),
            (go("stat /x: no such file or directory"), Some(Matter::Missing)),
            (go("permission denied"), Some(Matter::NotExecutable)),
            ("open /x: no such file or directory".into(), None),
            ("the file system was not found there".into(), None),
        ] {
            assert_eq!(program_matter(&text), matter, "{text}");
        }
    }

    #[test]
    fn users_are_numbers() {
        let user = numbers("1000:5").unwrap();
        assert_eq!((user.UID, user.GID), (1000, 5));
        assert_eq!(numbers("").unwrap().UID, 0);
        assert!(numbers("root").unwrap_err().to_string().contains("by number"));
    }
}
