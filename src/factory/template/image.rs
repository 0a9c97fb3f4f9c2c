//! A template's files: taken as they are when they are whole and fit, else made.
//!
//! Invariants: the files have no names until the VM that made them has been
//! saved, and the manifest comes last, so that a creation that is cut short, at
//! whatever point, leaves no template and at most files that the next one
//! clears away.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{fchown, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{AtFlags, OFlag, AT_FDCWD};
use nix::unistd::{geteuid, linkat};

use super::manifest::{self, Manifest, Parts};
use super::memory;
use super::path;
use super::place::Place;
use crate::agent::Agent;
use crate::config::Config;
use crate::digest::sha256;
use crate::events::event;
use crate::hypervisor::qemu::bzimage;
use crate::report::chain;
use crate::sys::sealed;
use crate::trusted_path::Destination;
use crate::vm::birth::Watch;
use crate::vm::boot::{boot_template, BootError, Phase};
use crate::vm::shape::{self, Stamp};
use crate::walls::Wall;
use crate::workload::rehearsal;

/// The memory's file.
const MEMORY: &str = "memory";
/// The device state's.
const STATE: &str = "state";
/// After so many clones in a row that failed, a template is made anew.
const SUSPECT: u32 = 2;
/// Beyond one creation, until whoever works on the template must be done.
const LOCKED: Duration = Duration::from_secs(30);

/// A whole template, held open: what is done to its directory does not change it.
#[derive(Debug)]
pub struct Image {
    /// The guest's memory.
    pub memory: File,
    state: File,
    /// The kernel's head, where it has one; it fits the manifest.
    pub head: Option<File>,
    /// Its manifest's file.
    stamp: Stamp,
    parts: Parts,
    /// The files that it was made from, as they were looked at.
    sources: Vec<Option<Stamp>>,
    /// Clones in a row that failed.
    failures: AtomicU32,
}

impl Image {
    /// The device state, from its beginning.
    ///
    /// # Errors
    /// As open(2).
    pub fn state(&self) -> io::Result<File> {
        reopened(&self.state)
    }

    /// A clone came up, or did not for this reason. Only what a damaged template
    /// can cause is held against it.
    pub fn judge(&self, failed: Option<&BootError>) {
        let phases = [Phase::Monitor, Phase::State, Phase::Guest, Phase::Identity];
        match failed {
            None => self.failures.store(0, Ordering::Relaxed),
            Some(e) if phases.contains(&e.phase) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
            }
            Some(_) => {}
        }
    }

    /// How many clones in a row failed, when they are too many.
    pub fn suspect(&self) -> Option<u32> {
        let failures = self.failures.load(Ordering::Relaxed);
        (failures >= SUSPECT).then_some(failures)
    }

    /// Whether it is still what the configuration and its directory say. That
    /// another configuration has put its own template there is no reason to take
    /// turns at making it.
    pub fn current(&self, config: &Config) -> bool {
        let place = path(config);
        let there = match manifest::stamp(&place) {
            Some(stamp) if stamp == self.stamp => true,
            Some(_) => Manifest::read(&place).is_ok_and(|(m, _)| m.parts != self.parts),
            None => false,
        };
        there && self.sources == shape::stamps(config)
    }
}

/// Another opening of the same file, which reads from its beginning.
fn reopened(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// An error of the file system on a path, with the path.
fn on(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |e| io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

/// How long to wait for somebody else's work on a template.
pub fn patience(config: &Config) -> Duration {
    config.boot_timeout + LOCKED
}

/// Takes the template that is there, or makes one; whether it was made.
pub fn obtain(config: &Config, anew: bool, watch: Watch<'_>) -> Result<(Image, bool), BootError> {
    let none = |e: io::Error| BootError::no_template(e.into());
    let place = Place::open(&path(config), config.memory(), patience(config));
    let place = place.map_err(|e| BootError::no_template(e.into()))?;
    let sources = shape::stamps(config);
    let parts = Parts::of(config).map_err(none)?;
    if !anew {
        match reuse(config, &place, &parts, &sources) {
            Ok(image) => {
                event!(TEMPLATE_REUSED; "{}", place.path().display());
                return Ok((image, false));
            }
            Err(why) => event!(TEMPLATE_MISSING; "{}: {why}", place.path().display()),
        }
    }
    let before = Instant::now();
    event!(TEMPLATE_MAKING; "a VM is booted to be cloned, in {}", place.path().display());
    let image = make(config, &place, parts, sources, watch).inspect_err(|e| {
        if let Err(e) = clear(&place) {
            log::warn!("clear {}: {e}", place.path().display());
        }
        log::debug!("template: {}", chain(e));
    })?;
    event!(
        TEMPLATE_READY, seconds = format_args!("{:.3}", before.elapsed().as_secs_f64());
        "{} after {:.1} s",
        place.path().display(),
        before.elapsed().as_secs_f64()
    );
    Ok((image, true))
}

/// What a template's files take, in bytes: less than their length, for nothing is
/// kept of memory that its guest never touched.
pub fn size(place: &Path) -> io::Result<u64> {
    let blocks = |name: &str| fs::metadata(place.join(name)).map(|m| m.blocks() * 512);
    Ok(blocks(MEMORY)? + blocks(STATE)?)
}

/// Whether a template's files are there, of the size that its manifest says.
pub fn complete(place: &Path, manifest: &Manifest) -> bool {
    let size = |name: &str| fs::metadata(place.join(name)).map(|m| m.len()).ok();
    size(MEMORY) == Some(u64::from(manifest.memory_mib) << 20)
        && size(STATE) == Some(manifest.state_bytes)
}

/// The template that is there, when it is whole and fits.
fn reuse(
    config: &Config,
    place: &Place,
    parts: &Parts,
    sources: &[Option<Stamp>],
) -> io::Result<Image> {
    let (manifest, stamp) = Manifest::read(place.path())?;
    if manifest.parts != *parts {
        return Err(io::Error::other("it was made from other files or options"));
    }
    let open = |name: &str| {
        let path = place.path().join(name);
        Destination::of(&path).and_then(|file| file.open(true)).map_err(on(&path))
    };
    let (memory, state) = (open(MEMORY)?, open(STATE)?);
    let wrong = || Err(io::Error::other("its files are not what its manifest says"));
    if !complete(place.path(), &manifest) || sha256(reopened(&state)?)? != manifest.state_sha256 {
        return wrong();
    }
    let (memory, digest) = clonable(memory)?;
    if digest != manifest.memory_sha256 {
        return wrong();
    }
    image(config, memory, state, stamp, parts.clone(), sources.to_vec())
}

/// Memory as clones open it, and its digest.
fn clonable(file: File) -> io::Result<(File, String)> {
    match Wall::Seals.stands() {
        true => memory::sealed(&file),
        false => memory::digest(&file).map(|digest| (file, digest)),
    }
}

fn image(
    config: &Config,
    memory: File,
    state: File,
    stamp: Stamp,
    parts: Parts,
    sources: Vec<Option<Stamp>>,
) -> io::Result<Image> {
    let head = bzimage::head(&config.kernel()).map_err(on(&config.kernel()))?;
    let state = match Wall::Seals.stands() {
        true => sealed::copy(c"vmcache-state", &mut reopened(&state)?)?,
        false => state,
    };
    Ok(Image { memory, state, head, stamp, parts, sources, failures: AtomicU32::new(0) })
}

/// Makes a template, from an empty place to its manifest.
fn make(
    config: &Config,
    place: &Place,
    parts: Parts,
    sources: Vec<Option<Stamp>>,
    watch: Watch<'_>,
) -> Result<Image, BootError> {
    let none = |e: io::Error| BootError::no_template(e.into());
    clear(place).map_err(none)?;
    place.room(config.memory()).map_err(|e| BootError::no_template(e.into()))?;
    let file = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).custom_flags(OFlag::O_TMPFILE.bits());
        options.open(place.path()).map_err(on(place.path()))
    };
    let (memory, state) = (file().map_err(none)?, file().map_err(none)?);
    memory.set_len(u64::from(config.memory()) << 20).map_err(none)?;
    let warm = |agent: &dyn Agent, own: bool| {
        if !own {
            return;
        }
        // A guest without our agent's program: its clones merely start cold.
        if let Err(e) = rehearsal::run(agent) {
            event!(TEMPLATE_COLD; "its guest ran no command before: {}", chain(&e));
        }
    };
    let qemu_version = boot_template(config, &memory, &state, &warm, watch)?;
    let finish = || {
        // It was the user's whose QEMU has filled it.
        fchown(&memory, Some(geteuid().as_raw()), None)?;
        name(&memory, &place.path().join(MEMORY))?;
        name(&state, &place.path().join(STATE))?;
        let (memory, memory_sha256) = clonable(memory)?;
        let manifest = Manifest {
            parts: parts.clone(),
            qemu_version,
            memory_mib: config.memory(),
            state_bytes: state.metadata()?.len(),
            state_sha256: sha256(reopened(&state)?)?,
            memory_sha256,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        };
        manifest.write(place.path())?;
        let (_, stamp) = Manifest::read(place.path())?;
        image(config, memory, state, stamp, parts, sources)
    };
    finish().map_err(none)
}

/// Gives a file that has no name one.
fn name(file: &File, path: &Path) -> io::Result<()> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, from.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
        .map_err(|e| on(path)(e.into()))
}

/// Removes what a template consists of, the manifest first.
pub fn clear(place: &Place) -> io::Result<()> {
    for name in [manifest::FILE, MEMORY, STATE, manifest::NEW] {
        match fs::remove_file(place.path().join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}
