//! What a QEMU that is root sees of the host's files: a root directory of its own, with its
//! programs, its devices, its images and its VM's directory, each a mount of its own, and
//! nothing else.
//!
//! A user of its own has nothing to fear from root's files and needs no such view; root has
//! their owner's rights, which Landlock limits for opening them only.
//!
//! Invariants: only its VM's directory, and what the configuration names to be written, can
//! be written there, and no device file made there opens; a path means what it means to the
//! server, symbolic links included; it goes with the QEMU.
//!
//! Source: mount_namespaces(7), pivot_root(2).

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{symlink, DirBuilderExt, FileTypeExt};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::after;
use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::sys::stat::Mode;
use nix::unistd::pivot_root;

use crate::sys::mount::{attach, put, tree, Denies};
use crate::worker::Worker;

/// Until it is made.
const MAKING: Duration = Duration::from_secs(10);
/// Symbolic links on the way to one path.
const MAX_LINKS: usize = 40;
/// How often a mount that is busy is made read-only again, and the pause between.
const BUSY_TRIES: u32 = 100;
const BUSY: Duration = Duration::from_millis(5);

/// What is to be seen.
#[derive(Debug, Default)]
pub struct View {
    /// Programs, libraries, data: not to be written.
    pub read: Vec<PathBuf>,
    /// Devices.
    pub devices: Vec<PathBuf>,
    /// To be written.
    pub write: Vec<PathBuf>,
}

/// A mount namespace of this; what is not there is left out. `dir` is the VM's directory, to
/// be written, too.
///
/// # Errors
/// As the system calls'; the text says which.
pub fn namespace(view: View, dir: &Path) -> io::Result<OwnedFd> {
    let dir = dir.to_path_buf();
    let thread = Worker::spawn("vmc-mounts", move || make(&view, &dir));
    thread.and_then(|t| t.join(MAKING)).map_err(|e| io::Error::other(e.to_string()))?
}

/// A mount namespace like this one, in which a directory is seen with these denials, and what is
/// mounted in it is not.
///
/// # Errors
/// As [`namespace`]; `EPERM` for who may make none.
pub fn covering(directory: &Path, denies: Denies) -> io::Result<OwnedFd> {
    let directory = directory.to_path_buf();
    let thread = Worker::spawn("vmc-mounts", move || -> io::Result<OwnedFd> {
        separate()?;
        put(tree(&directory, denies)?.as_fd(), &directory)?;
        this_threads()
    });
    thread.and_then(|t| t.join(MAKING)).map_err(|e| io::Error::other(e.to_string()))?
}

fn during(what: &str) -> impl Fn(io::Error) -> io::Error + '_ {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}

/// By a thread of its own, which lives in it and then ends.
fn make(view: &View, dir: &Path) -> io::Result<OwnedFd> {
    separate().map_err(during("separate mounts from the host's"))?;
    let none = None::<&str>;
    let plan = Plan::of(view, dir)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Any directory will do to stand on: this is the VM's, whose contents are in the plan.
    mount(Some("vmcache-view"), dir, Some("tmpfs"), flags, Some("mode=0755,size=1m"))
        .map_err(|e| during("mount a root directory")(e.into()))?;
    plan.build(dir)?;
    let proc = dir.join("proc");
    fs::create_dir(&proc).map_err(during("make /proc"))?;
    let read_only = flags | MsFlags::MS_RDONLY;
    mount(Some("proc"), &proc, Some("proc"), read_only, none)
        .map_err(|e| during("mount /proc")(e.into()))?;
    remount_read_only(dir, flags)
        .map_err(|e| during("make the root directory read-only")(e.into()))?;
    std::env::set_current_dir(dir)?;
    pivot_root(".", ".").map_err(|e| during("change the root directory")(e.into()))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(|e| during("leave the host's files")(e.into()))?;
    this_threads()
}

/// Gives this thread mounts of its own, of which the host sees nothing.
/// Makes a mount read-only; whoever still has it open for writing, as one that was forked
/// meanwhile and has not executed its program, has it for a moment.
fn remount_read_only(dir: &Path, flags: MsFlags) -> nix::Result<()> {
    let none = None::<&str>;
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    let mut tries = 0;
    loop {
        match mount(none, dir, none, flags, none) {
            Err(Errno::EBUSY) if tries < BUSY_TRIES => tries += 1,
            done => return done,
        }
        let _ = after(BUSY).recv();
    }
}

fn separate() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)?;
    let none = None::<&str>;
    Ok(mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?)
}

/// The mount namespace of this thread.
fn this_threads() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/mnt")?.into())
}

/// What stands where.
#[derive(Default)]
struct Plan {
    /// Symbolic links and where they lead.
    links: BTreeMap<PathBuf, PathBuf>,
    /// Files and directories, and whether they are the latter.
    trees: BTreeMap<PathBuf, (OwnedFd, bool)>,
}

impl Plan {
    fn of(view: &View, dir: &Path) -> io::Result<Plan> {
        let mut plan = Plan::default();
        let read =
            Denies { writes: true, devices: true, set_ids: true, whole: true, programs: false };
        // What a device does when it is written is no writing to its file system; its mode is.
        let device = Denies { writes: true, programs: true, set_ids: true, ..Denies::default() };
        let write =
            Denies { devices: true, programs: true, set_ids: true, whole: true, writes: false };
        // In this order: a path that is to be written and lies below one that is not is a mount
        // upon it.
        for (paths, denies) in [(&view.read, read), (&view.devices, device), (&view.write, write)] {
            for path in paths.iter().filter(|p| p.is_absolute()) {
                plan.add(path, denies)?;
            }
        }
        plan.add(dir, write)?;
        Ok(plan)
    }

    fn add(&mut self, path: &Path, denies: Denies) -> io::Result<()> {
        let Some(real) = self.resolve(path) else { return Ok(()) };
        let Ok(meta) = fs::symlink_metadata(&real) else { return Ok(()) };
        // Seen already, as part of a directory that is no more restricted.
        let covered = denies.writes && !meta.file_type().is_char_device();
        if self.trees.contains_key(&real)
            || covered && real.ancestors().skip(1).any(|above| self.trees.contains_key(above))
        {
            return Ok(());
        }
        let seen = tree(&real, denies);
        let seen = seen.map_err(|e| during(&format!("show {}", real.display()))(e))?;
        self.trees.insert(real, (seen, meta.is_dir()));
        Ok(())
    }

    /// Where a path leads, and the links on its way; `None` when nothing is there.
    fn resolve(&mut self, path: &Path) -> Option<PathBuf> {
        let mut real = PathBuf::from("/");
        let mut left: Vec<PathBuf> = parts(path);
        left.reverse();
        let mut links = 0;
        while let Some(part) = left.pop() {
            if part == Path::new("..") {
                real.pop();
                continue;
            }
            let next = real.join(&part);
            let meta = fs::symlink_metadata(&next).ok()?;
            if !meta.is_symlink() {
                real = next;
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return None;
            }
            let target = fs::read_link(&next).ok()?;
            if target.is_absolute() {
                real = PathBuf::from("/");
            }
            left.extend(parts(&target).into_iter().rev());
            self.links.insert(next, target);
        }
        Some(real)
    }

    fn build(self, root: &Path) -> io::Result<()> {
        let at = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o755).create(path);
        let within = |path: &Path, trees: &BTreeMap<PathBuf, (OwnedFd, bool)>| {
            path.ancestors().skip(1).any(|above| trees.contains_key(above))
        };
        for (path, (seen, is_dir)) in &self.trees {
            let place = at(path);
            // Below a directory that is shown it is there, with whatever it lies in.
            if !within(path, &self.trees) {
                match (is_dir, place.parent()) {
                    (true, _) => make(&place)?,
                    (false, Some(above)) => {
                        make(above).and_then(|()| File::create(&place).map(drop))?
                    }
                    (false, None) => {}
                }
            }
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let spot = open(&place, flags, Mode::empty())
                .map_err(|e| during(&format!("find {} there", path.display()))(e.into()))?;
            attach(seen.as_fd(), spot.as_fd())
                .map_err(during(&format!("put {} in its place", path.display())))?;
        }
        for (path, target) in self.links.iter().filter(|(path, _)| !within(path, &self.trees)) {
            let place = at(path);
            if let Some(above) = place.parent() {
                make(above)?;
            }
            match symlink(target, &place) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

fn parts(path: &Path) -> Vec<PathBuf> {
    let named =
        path.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir));
    named.map(|c| PathBuf::from(c.as_os_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use crate::sys::cage::Cage;

    /// What `sh -c script` says that sees this.
    fn inside(view: View, dir: &Path, script: &str) -> String {
        let mounts = Some(namespace(view, dir).unwrap());
        let args = ["-c".into(), script.into()];
        let cage = Cage { mounts, ..Cage::default() };
        let mut shell = Process::spawn(Path::new("/bin/sh"), &args, &[], true, cage).unwrap();
        assert!(shell.wait(Duration::from_secs(10)));
        shell.last_words()
    }

    #[test]
    fn root_sees_what_is_shown_and_writes_in_its_own_directory_only() {
        let base = std::env::temp_dir().join(format!("vmcache-view-{}", std::process::id()));
        let own = base.join("own");
        fs::create_dir_all(&own).unwrap();
        fs::write(base.join("image"), "an image").unwrap();
        fs::write(base.join("secret"), "").unwrap();
        symlink(base.join("image"), base.join("link")).unwrap();
        let view = || View {
            read: ["/usr", "/bin", "/lib", "/lib64"]
                .iter()
                .map(PathBuf::from)
                .chain([base.join("link")])
                .collect(),
            devices: vec!["/dev/null".into(), "/dev/zero".into()],
            write: Vec::new(),
        };
        let b = base.display();
        let script = format!(
            "cat {b}/link; echo; ls {b}; ls /; echo mine >{b}/own/file && echo written; \
             for f in {b}/image {b}/new /usr/new /new; do touch $f || echo no; done; \
             mknod {b}/own/null c 1 3 && head -c1 <{b}/own/null; chmod 666 /dev/null && echo chmod; \
             echo x >/dev/null && echo null"
        );
        let said = inside(view(), &own, &script);
        assert!(
            said.contains("an image") && said.contains("written") && said.ends_with("null"),
            "{said}"
        );
        assert!(!said.contains("secret") && !said.contains("etc"), "{said}");
        assert!(!said.contains("chmod\n"), "{said}");
        assert_eq!(said.matches("no\n").count(), 4, "{said}");
        assert!(said.contains("own/null: Permission denied"), "{said}");
        assert_eq!(fs::read(own.join("file")).unwrap(), b"mine\n");
        // It is the host's no more than the VM's.
        assert!(!own.join("proc").exists());
        fs::remove_dir_all(&base).unwrap();
    }
}
