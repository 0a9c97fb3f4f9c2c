//! Guests whose agent is Kata's own, which can do less than ours: it has no root
//! to share with a command, no tar, no user names.
//!
//! Invariants: no command is run in the guest's own root, whose agent would not
//! survive it; files come by CopyFile, below the one directory where Kata's agents
//! take them.
//!
//! Does not: bring devices, sockets and hard links of a root file system along.

use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Error, Guest};
use crate::proto::agent::CopyFileRequest;
use crate::proto::oci::{LinuxCapabilities, LinuxResources, Process, Spec, User};

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
    send_directory(guest, source, Path::new(ROOT))
}

fn send_directory(guest: &Guest, source: &Path, target: &Path) -> Result<(), Error> {
    let failed =
        |source_error| Error::Io { during: "read", path: source.into(), source: source_error };
    let mut entries: Vec<PathBuf> = fs::read_dir(source)
        .map_err(failed)?
        .map(|e| e.map(|e| e.path()))
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    entries.sort();
    for path in entries {
        let Some(name) = path.file_name() else { continue };
        send(guest, &path, &target.join(name))?;
    }
    Ok(())
}

fn send(guest: &Guest, path: &Path, target: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io { during: "read", path: path.to_path_buf(), source };
    let meta = fs::symlink_metadata(path).map_err(failed)?;
    let request = CopyFileRequest {
        path: target.to_string_lossy().into_owned(),
        file_mode: meta.mode(),
        dir_mode: 0o755,
        uid: meta.uid() as i32,
        gid: meta.gid() as i32,
        ..CopyFileRequest::default()
    };
    let copy = |r: CopyFileRequest| guest.agent().copy_file(r).map_err(Error::Agent);
    let kind = meta.file_type();
    if kind.is_dir() {
        // Agents of 1.x make directories with the files in them, and take no others.
        if guest.agent().kind() == crate::agent::Kind::Kata {
            copy(request)?;
        }
        return send_directory(guest, path, target);
    }
    if kind.is_symlink() {
        let data = fs::read_link(path).map_err(failed)?.as_os_str().as_bytes().to_vec();
        return copy(CopyFileRequest { file_size: data.len() as i64, data, ..request });
    }
    if !kind.is_file() {
        return Ok(());
    }
    let mut file = fs::File::open(path).map_err(failed)?;
    let mut offset = 0;
    loop {
        let mut data = Vec::new();
        (&mut file).take(PIECE.min(meta.len() - offset)).read_to_end(&mut data).map_err(failed)?;
        let n = data.len() as u64;
        if n == 0 && offset < meta.len() {
            let text = format!("{} became shorter while it was copied", path.display());
            return Err(Error::Copy { text });
        }
        let (file_size, at) = (meta.len() as i64, offset as i64);
        copy(CopyFileRequest { file_size, offset: at, data, ..request.clone() })?;
        offset += n;
        if offset >= meta.len() {
            return Ok(());
        }
    }
}

/// Changes a specification to what Kata's agents understand.
///
/// # Errors
/// [`Error::Copy`] with what they do not: a user by name.
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

/// `user[:group]` in numbers.
fn numbers(text: &str) -> Result<User, Error> {
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    let number = |t: &str| match t {
        "" => Ok(0),
        t => t.parse::<u32>().map_err(|_| Error::Copy {
            text: format!("user {text:?}: an agent of Kata's knows users and groups by number"),
        }),
    };
    Ok(User { UID: number(user)?, GID: number(group)?, ..User::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers() {
        let user = numbers("1000:5").unwrap();
        assert_eq!((user.UID, user.GID), (1000, 5));
        assert_eq!(numbers("").unwrap().UID, 0);
        assert!(numbers("root").unwrap_err().to_string().contains("by number"));
    }
}
