//! What a VM's processes may open, by Landlock: another VM's files are not among it,
//! nor anything of their own but what they write.
//!
//! Sockets, disks, taps and the memory of templates come as open files, which no rule
//! touches. A kernel without Landlock (before 5.13) confines nothing here; one with an older
//! version of it does what it can. Where the kernel can forbid it, they use no TCP, and
//! signal and trace no other process; everywhere, [`super::calls`] does.
//!
//! Source: Linux's Documentation/userspace-api/landlock.rst.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use landlock::{
    Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope, ABI,
};

use crate::config::options::{OURS, QEMU};
use crate::config::Config;
use crate::confine::mounts::View;
use crate::hypervisor::qemu::argv::{HUGEPAGES, SHARED};
use crate::walls;

/// What is known of Landlock here.
const KNOWN: ABI = ABI::V6;

/// The same, or what a test allows.
fn known() -> ABI {
    match walls::landlock_abi() {
        Some(1) => ABI::V1,
        Some(2) => ABI::V2,
        Some(3) => ABI::V3,
        _ => KNOWN,
    }
}
/// Programs, their libraries and data.
const PROGRAMS: [&str; 6] = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store"];
/// What they read beside that.
const READ: [&str; 6] = [
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    "/etc/qemu",
    "/sys/devices/system",
    "/sys/kernel/mm",
];
/// Where the host's resolvers stand.
const RESOLVERS: [&str; 4] =
    ["/etc/resolv.conf", "/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf"];
/// Devices that belong to no VM.
const DEVICES: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/kvm", "/dev/vhost-net"];

/// What a program opens; what is not there is left out.
#[derive(Debug, Default)]
pub struct Needs {
    programs: Vec<PathBuf>,
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    /// Directories in which it binds sockets.
    sockets: Vec<PathBuf>,
    /// Directories in which it does all.
    all: Vec<PathBuf>,
}

impl Needs {
    fn of(program: &Path) -> Needs {
        let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect();
        let mut needs = Needs {
            programs: paths(&PROGRAMS),
            read: paths(&READ),
            write: paths(&DEVICES),
            sockets: Vec::new(),
            all: Vec::new(),
        };
        needs.programs.push(program.to_path_buf());
        needs
    }

    /// The same as what is to be seen; the file of a template, which comes open, is not.
    pub fn view(&self) -> View {
        let named =
            |all: &[PathBuf]| all.iter().filter(|p| !p.starts_with("/proc")).cloned().collect();
        View {
            read: [&self.programs[..], &self.read].concat(),
            devices: named(&self.write),
            write: self.all.clone(),
        }
    }
}

/// What QEMU needs; `file` is one that it opens anew to write to it.
///
/// # Errors
/// As readlink(2).
pub fn qemu(config: &Config, dir: &Path, file: Option<&File>) -> io::Result<Needs> {
    let mut needs = Needs::of(&config.qemu());
    needs.read.extend([config.kernel(), config.initrd()]);
    needs.read.extend([config.text(QEMU, "firmware").into()]);
    needs.write.push(config.text(QEMU, "entropy_source").into());
    if let Some(file) = file {
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // One that is in no file system no rule is about.
        if !std::fs::read_link(&path)?.starts_with("/memfd:vmcache-template (deleted)") {
            needs.write.push(path);
        }
    }
    if config.flag(QEMU, "enable_hugepages") {
        needs.all.push(HUGEPAGES.into());
    }
    needs.all.push(config.text(QEMU, "file_mem_backend").into());
    if config.shares_9p() {
        needs.all.push(dir.join(SHARED));
    }
    needs.all.extend(config.list(OURS, "confine_paths").into_iter().map(PathBuf::from));
    Ok(needs)
}

/// What a program needs that speaks for a guest on the host's network: it asks the host's
/// resolvers, whose file is a link, often.
pub fn user_network(program: &Path) -> Needs {
    let mut needs = Needs::of(program);
    needs.read.extend(RESOLVERS.iter().map(PathBuf::from));
    needs
}

/// What the program that carries a guest's vsock needs: its sockets are in `dir`.
pub fn vsock_device(program: &Path, dir: &Path) -> Needs {
    Needs { sockets: vec![dir.to_path_buf()], ..Needs::of(program) }
}

/// Whether this host's kernel can confine so.
pub fn possible() -> bool {
    matches!(ruleset(&Needs::default()), Ok(Some(_)))
}

/// The rules; `None` where the kernel has no Landlock.
///
/// # Errors
/// As the system calls'.
pub fn ruleset(needs: &Needs) -> io::Result<Option<OwnedFd>> {
    rules(needs, true)
}

/// The same for a process that uses the host's network.
///
/// # Errors
/// As [`ruleset`].
pub fn ruleset_with_network(needs: &Needs) -> io::Result<Option<OwnedFd>> {
    rules(needs, false)
}

fn rules(needs: &Needs, no_network: bool) -> io::Result<Option<OwnedFd>> {
    let failed = |e: landlock::RulesetError| io::Error::other(format!("make its rules: {e}"));
    let known = known();
    let all = AccessFs::from_all(known);
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let file = device | AccessFs::Truncate;
    let sockets = AccessFs::MakeSock | AccessFs::ReadDir;
    // No device files: what a guest makes in a shared directory is files of the host's.
    let shared = all & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock);
    let granted: [(&[PathBuf], BitFlags<AccessFs>); 5] = [
        (&needs.programs, AccessFs::from_read(known)),
        (&needs.read, AccessFs::ReadFile | AccessFs::ReadDir),
        (&needs.write, file),
        (&needs.sockets, sockets),
        (&needs.all, shared),
    ];
    let mut rules = Ruleset::default().handle_access(all).map_err(failed)?;
    for more in [AccessNet::from_all(known)].into_iter().filter(|n| no_network && !n.is_empty()) {
        rules = rules.handle_access(more).map_err(failed)?;
    }
    for more in [Scope::from_all(known)].into_iter().filter(|s| !s.is_empty()) {
        rules = rules.scope(more).map_err(failed)?;
    }
    let mut rules = rules.create().map_err(failed)?;
    for (paths, access) in granted {
        for path in paths.iter().filter(|p| !p.as_os_str().is_empty()) {
            let Ok(opened) = PathFd::new(path) else { continue };
            // Directories' rights say nothing of a file, nor newer ones to an older version.
            let access = all
                & match path.is_dir() {
                    true => access,
                    false => access & AccessFs::from_file(known),
                };
            rules = rules.add_rule(PathBeneath::new(opened, access)).map_err(failed)?;
        }
    }
    Ok(rules.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use crate::sys::cage::Cage;
    use std::fs;
    use std::time::Duration;

    /// What `sh -c script` says when it may open what `needs` grant.
    fn confined(needs: &Needs, script: &str) -> String {
        let files = ruleset(needs).unwrap();
        let cage = Cage { files, no_new_privileges: true, ..Cage::default() };
        let args = ["-c".into(), script.into()];
        let mut shell = Process::spawn(Path::new("/bin/sh"), &args, &[], true, cage).unwrap();
        assert!(shell.wait(Duration::from_secs(10)));
        shell.last_words()
    }

    #[test]
    fn what_is_not_granted_can_not_be_opened() {
        assert!(possible(), "this kernel has no Landlock: the test can show nothing");
        let base = std::env::temp_dir().join(format!("vmcache-files-{}", std::process::id()));
        let (own, other) = (base.join("own"), base.join("other"));
        for dir in [&own, &other] {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join("ledger"), "secret").unwrap();
        }
        let needs = Needs::of(Path::new("/bin/sh"));
        let (own, other) = (own.display(), other.display());
        for denied in [
            format!("cat {other}/ledger"),
            format!("cat {own}/ledger"),
            format!("echo x > {own}/ledger"),
            format!("rm {own}/ledger"),
            format!("mv {own}/ledger {own}/x"),
            "cat /etc/passwd".into(),
            "ls /proc/1/".into(),
        ] {
            assert!(confined(&needs, &denied).contains("ermission denied"), "{denied}");
        }
        assert!(confined(&needs, "echo fine < /dev/urandom").contains("fine"));
        fs::remove_dir_all(&base).unwrap();
    }
}
