//! The template factory: one VM is booted, its memory and device state kept,
//! and every further VM is a clone of it, in a fraction of a boot's time and
//! memory.
//!
//! Files: `place` the directory in memory, `manifest` what a template was
//! made from, `image` its files, `memory` what they are.
//!
//! Invariants: a template is whole or it is not there; it is used only while it
//! fits the configuration and the files that it names; a clone has its own
//! identity before anybody sees it; a template whose clones fail is made anew.
//!
//! Does not: keep the template's VM running. Clones share its pages, so one
//! guest can measure what another has touched: templates are off by default.

mod image;
mod manifest;
mod memory;
mod place;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use image::Image;
pub use manifest::Manifest;
use manifest::Parts;
pub use place::Error as PlaceError;
use place::Place;

use super::{BaseFactory, Error, VmStatus};
use crate::config::options::FACTORY;
use crate::config::Config;
use crate::events::event;
use crate::trusted_path::{check_existing, refused, Kind};
use crate::vm::birth::Watch;
use crate::vm::boot::{boot_clone, BootError, Origin, Purpose};
use crate::vm::{Vm, VmConfig};

/// How long another process may work on a place that shall be made.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes clones of one template, from as many threads as like.
#[derive(Debug)]
pub struct Template {
    config: Arc<Config>,
    /// Locked before the directory is, never after.
    current: Mutex<Option<Arc<Image>>>,
}

/// What `vmcache template status` tells.
#[derive(Debug)]
pub struct Status {
    /// Where it is.
    pub path: PathBuf,
    /// What it says of itself; `None` when there is none.
    pub manifest: Option<Manifest>,
    /// Whether it is whole and fits the configuration as it is now.
    pub fits: bool,
}

fn path(config: &Config) -> PathBuf {
    config.text(FACTORY, "template_path").into()
}

impl Template {
    /// The template of a configuration; nothing is made yet.
    pub fn new(config: &Arc<Config>) -> Template {
        Template { config: Arc::clone(config), current: Mutex::default() }
    }

    /// Makes the place in memory where it will be.
    ///
    /// # Errors
    /// What is wrong with that place.
    pub fn place(&self) -> Result<(), impl std::error::Error> {
        Place::open(&path(&self.config), self.config.memory(), PATIENCE).map(|_| ())
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Image>>> {
        self.current.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A clone; the template is made first when there is none that fits, while
    /// other threads that want a clone wait.
    ///
    /// # Errors
    /// [`BootError`], with nothing left behind but a whole template.
    pub fn clone_vm(&self, purpose: &Purpose, watch: Watch<'_>) -> Result<Vm, BootError> {
        let (image, _) = self.image(watch)?;
        let state = image.state().map_err(|e| BootError::no_template(e.into()))?;
        let origin = Origin { memory: &image.memory, head: image.head.as_ref(), state: &state };
        let made = boot_clone(&self.config, purpose, origin, watch);
        image.judge(made.as_ref().err());
        made
    }

    /// The template, which fits, and whether it had to be made.
    fn image(&self, watch: Watch<'_>) -> Result<(Arc<Image>, bool), BootError> {
        let mut current = self.current();
        let suspect = current.as_ref().and_then(|i| i.suspect());
        let good = |image: &&Arc<Image>| suspect.is_none() && image.current(&self.config);
        if let Some(image) = current.as_ref().filter(good) {
            return Ok((Arc::clone(image), false));
        }
        *current = None;
        if let Some(failures) = suspect {
            event!(TEMPLATE_SUSPECT; "{failures} clones in a row failed");
        }
        let (image, made) = image::obtain(&self.config, suspect.is_some(), watch)?;
        let image = Arc::new(image);
        *current = Some(Arc::clone(&image));
        Ok((image, made))
    }

    /// Makes the template unless there is one that fits; whether it was made.
    ///
    /// # Errors
    /// [`BootError`]; there is then no template.
    pub fn create(&self, watch: Watch<'_>) -> Result<bool, BootError> {
        self.image(watch).map(|(_, made)| made)
    }

    /// What there is.
    ///
    /// # Errors
    /// When the files that it is made from cannot be read, or others can change its own.
    pub fn status(&self) -> io::Result<Status> {
        let path = path(&self.config);
        check_existing(&path, Kind::Directory)?;
        let manifest = match Manifest::read(&path) {
            Err(e) if refused(&e).is_some() => return Err(e),
            read => read.ok().map(|(m, _)| m),
        };
        let parts = Parts::of(&self.config)?;
        let fits = |m: &Manifest| m.parts == parts && image::complete(&path, m);
        let fits = manifest.as_ref().is_some_and(fits);
        Ok(Status { path, manifest, fits })
    }

    /// What its files take of the host's memory, in bytes.
    ///
    /// # Errors
    /// When there is none.
    pub fn size(&self) -> io::Result<u64> {
        image::size(&path(&self.config))
    }

    /// Removes it; clones that run, and servers that make clones of it, keep the
    /// memory they share until they end. Whether there was one.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn destroy(&self) -> Result<bool, PlaceError> {
        let path = path(&self.config);
        if !path.exists() {
            return Ok(false);
        }
        let mut current = self.current();
        let place = Place::lock(&path, image::patience(&self.config))?;
        *current = None;
        let there = manifest::stamp(&path).is_some();
        image::clear(&place).map_err(|source| PlaceError::Io { during: "clear", path, source })?;
        place.remove()?;
        Ok(there)
    }
}

impl BaseFactory for Template {
    fn config(&self) -> Result<VmConfig, Error> {
        Ok(VmConfig::of(&self.config))
    }

    fn get_base_vm(&self, _within: Option<Duration>) -> Result<Vm, Error> {
        self.clone_vm(&Purpose::Own { leased: false, waits: false }, &mut |_| {})
            .map_err(|e| Error::Boot(Box::new(e)))
    }

    fn status(&self) -> Result<Vec<VmStatus>, Error> {
        Ok(Vec::new())
    }

    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}
