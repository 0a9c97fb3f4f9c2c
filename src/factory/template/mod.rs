//! The template factory: one VM is booted, its memory and device state kept,
//! and every further VM is a clone of it, in a fraction of a boot's time and
//! memory.
//!
//! Invariants: a template is whole or it is not there (its manifest is written
//! last and removed first); it is used only while it fits the configuration; a
//! clone has its own identity before anybody sees it; a template whose clones
//! fail is made anew.
//!
//! Does not: keep the template's VM running. Clones share its pages, so one
//! guest can measure what another has touched: templates are off by default.

mod manifest;
mod place;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use manifest::Manifest;
use manifest::{Parts, Stamp};
pub use place::Error as PlaceError;
use place::Place;

use super::{BaseFactory, Error, VmStatus};
use crate::agent::Agent;
use crate::config::options::FACTORY;
use crate::config::Config;
use crate::hypervisor::qemu::bzimage;
use crate::hypervisor::qemu::process::Process;
use crate::report::chain;
use crate::vm::boot::{boot_clone, boot_template, BootError, Origin, Purpose};
use crate::vm::{Vm, VmConfig};
use crate::workload::rehearsal;

/// The memory's file.
const MEMORY: &str = "memory";
/// The device state's.
const STATE: &str = "state";
/// Added to a file's name until it is whole.
const PART: &str = ".part";
/// After so many clones in a row that failed, the template is made anew.
const SUSPECT: u32 = 2;

/// A whole template, held open: what is done to its directory does not change it.
#[derive(Debug)]
struct Image {
    memory: File,
    state: File,
    /// The kernel's, which fits the manifest.
    head: Option<File>,
    stamp: Stamp,
}

#[derive(Debug, Default)]
struct Current {
    image: Option<Arc<Image>>,
    /// Clones in a row that failed.
    failures: u32,
}

/// Makes clones of one template, from as many threads as like.
#[derive(Debug)]
pub struct Template {
    config: Arc<Config>,
    current: Mutex<Current>,
}

/// What `vmcache template status` tells.
#[derive(Debug)]
pub struct Status {
    /// Where it is.
    pub path: PathBuf,
    /// What it says of itself; `None` when there is none.
    pub manifest: Option<Manifest>,
    /// Whether it fits the configuration as it is now.
    pub fits: bool,
}

type Started<'a> = &'a mut dyn FnMut(&str, &Process);

fn path(config: &Config) -> PathBuf {
    config.text(FACTORY, "template_path").into()
}

/// An error of the file system on a path, with the path.
fn on(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |e| io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

impl Template {
    /// The template of a configuration; nothing is made yet.
    pub fn new(config: &Arc<Config>) -> Template {
        Template { config: Arc::clone(config), current: Mutex::default() }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A clone; the template is made first when there is none that fits, while
    /// other threads that want a clone wait.
    ///
    /// # Errors
    /// [`BootError`], with nothing left behind but a whole template.
    pub fn clone_vm(&self, purpose: &Purpose, started: Started<'_>) -> Result<Vm, BootError> {
        let image = self.image(started)?;
        let state = reopened(&image.state).map_err(|e| BootError::no_template(e.into()))?;
        let origin = Origin { memory: &image.memory, head: image.head.as_ref(), state: &state };
        let made = boot_clone(&self.config, purpose, origin, started);
        let mut current = self.current();
        match &made {
            Ok(_) => current.failures = 0,
            Err(_) => current.failures += 1,
        }
        made
    }

    /// The template, which fits.
    fn image(&self, started: Started<'_>) -> Result<Arc<Image>, BootError> {
        let mut current = self.current();
        let suspect = current.failures >= SUSPECT;
        let there = Stamp::now(&path(&self.config));
        if let Some(image) = current.image.as_ref().filter(|i| !suspect && there == Some(i.stamp)) {
            return Ok(Arc::clone(image));
        }
        current.image = None;
        if suspect {
            log::warn!("template-suspect: {} clones in a row failed", current.failures);
        }
        let image = Arc::new(obtain(&self.config, suspect, started)?);
        *current = Current { image: Some(Arc::clone(&image)), failures: 0 };
        Ok(image)
    }

    /// Makes the template unless there is one that fits; whether it was made.
    ///
    /// # Errors
    /// [`BootError`]; there is then no template.
    pub fn create(&self, started: Started<'_>) -> Result<bool, BootError> {
        let before = Stamp::now(&path(&self.config));
        let image = self.image(started)?;
        Ok(before != Some(image.stamp))
    }

    /// What there is.
    ///
    /// # Errors
    /// When the files that it is made from can not be read.
    pub fn status(&self) -> io::Result<Status> {
        let path = path(&self.config);
        let manifest = Manifest::read(&path).ok().map(|(m, _)| m);
        let parts = Parts::of(&self.config)?;
        let fits = manifest.as_ref().is_some_and(|m| m.parts == parts);
        Ok(Status { path, manifest, fits })
    }

    /// Removes it; clones that run keep the memory they share until they end.
    /// Whether there was one.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn destroy(&self) -> Result<bool, PlaceError> {
        let path = path(&self.config);
        if !path.exists() {
            return Ok(false);
        }
        let place = Place::lock(&path)?;
        self.current().image = None;
        let there = Stamp::now(&path).is_some();
        clear(&place).map_err(|source| PlaceError::Io { during: "clear", path, source })?;
        place.remove()?;
        Ok(there)
    }
}

/// Another opening of the same file, which reads from its beginning.
fn reopened(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn head(config: &Config) -> io::Result<Option<File>> {
    bzimage::head(&config.kernel()).map_err(on(&config.kernel()))
}

/// Takes the template that is there, or makes one.
fn obtain(config: &Config, anew: bool, started: Started<'_>) -> Result<Image, BootError> {
    let none = |e: io::Error| BootError::no_template(e.into());
    let place = Place::open(&path(config), config.memory());
    let place = place.map_err(|e| BootError::no_template(e.into()))?;
    let parts = Parts::of(config).map_err(none)?;
    if !anew {
        match reuse(config, &place, &parts) {
            Ok(image) => {
                log::info!("template-reused: {}", place.path().display());
                return Ok(image);
            }
            Err(why) => log::info!("template-missing: {}: {why}", place.path().display()),
        }
    }
    let before = Instant::now();
    log::info!("template-making: a VM is booted to be cloned, in {}", place.path().display());
    let image = make(config, &place, parts, started).inspect_err(|e| {
        if let Err(e) = clear(&place) {
            log::warn!("clear {}: {e}", place.path().display());
        }
        log::debug!("template: {}", chain(e));
    })?;
    log::info!(
        "template-ready: {} after {:.1} s",
        place.path().display(),
        before.elapsed().as_secs_f64()
    );
    Ok(image)
}

/// The template that is there, when it is whole and fits.
fn reuse(config: &Config, place: &Place, parts: &Parts) -> io::Result<Image> {
    let (manifest, stamp) = Manifest::read(place.path())?;
    if manifest.parts != *parts {
        return Err(io::Error::other("it was made from other files or options"));
    }
    let open = |name: &str| {
        let path = place.path().join(name);
        OpenOptions::new().read(true).write(true).open(&path).map_err(on(&path))
    };
    let (memory, state) = (open(MEMORY)?, open(STATE)?);
    let whole = memory.metadata()?.len() == u64::from(manifest.memory_mib) << 20
        && state.metadata()?.len() == manifest.state_bytes
        && manifest::digest(reopened(&state)?)? == manifest.state_sha256;
    match whole {
        true => Ok(Image { memory, state, head: head(config)?, stamp }),
        false => Err(io::Error::other("its files are not what its manifest says")),
    }
}

/// Makes a template, from an empty place to its manifest.
fn make(
    config: &Config,
    place: &Place,
    parts: Parts,
    started: Started<'_>,
) -> Result<Image, BootError> {
    let none = |e: io::Error| BootError::no_template(e.into());
    clear(place).map_err(none)?;
    place.room(config.memory()).map_err(|e| BootError::no_template(e.into()))?;
    let file = |name: &str| {
        let path = place.path().join(format!("{name}{PART}"));
        let options =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        options.map_err(on(&path))
    };
    let (memory, state) = (file(MEMORY).map_err(none)?, file(STATE).map_err(none)?);
    memory.set_len(u64::from(config.memory()) << 20).map_err(none)?;
    let warm = |agent: &dyn Agent| {
        // A guest without our agent's program: its clones merely start cold.
        if let Err(e) = rehearsal::run(agent) {
            log::info!("template-cold: its guest ran no command before: {}", chain(&e));
        }
    };
    let qemu_version = boot_template(config, &memory, &state, &warm, started)?;
    let finish = || {
        for name in [MEMORY, STATE] {
            let path = place.path().join(name);
            fs::rename(place.path().join(format!("{name}{PART}")), &path).map_err(on(&path))?;
        }
        let manifest = Manifest {
            parts,
            qemu_version,
            memory_mib: config.memory(),
            state_bytes: state.metadata()?.len(),
            state_sha256: manifest::digest(reopened(&state)?)?,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        };
        manifest.write(place.path())?;
        Manifest::read(place.path()).map(|(_, stamp)| stamp)
    };
    let stamp = finish().map_err(none)?;
    Ok(Image { memory, state, head: head(config).map_err(none)?, stamp })
}

/// Removes what a template consists of, the manifest first.
fn clear(place: &Place) -> io::Result<()> {
    let parts = [MEMORY, STATE].map(|n| format!("{n}{PART}"));
    let names = [manifest::FILE, MEMORY, STATE, "manifest.json.new", &parts[0], &parts[1]];
    for name in names {
        match fs::remove_file(place.path().join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

impl BaseFactory for Template {
    fn config(&self) -> Result<VmConfig, Error> {
        Ok(VmConfig::of(&self.config))
    }

    fn get_base_vm(&self, _within: Option<Duration>) -> Result<Vm, Error> {
        self.clone_vm(&Purpose::Own { leased: false, waits: false }, &mut |_, _| {})
            .map_err(|e| Error::Boot(Box::new(e)))
    }

    fn status(&self) -> Result<Vec<VmStatus>, Error> {
        Ok(Vec::new())
    }

    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}
