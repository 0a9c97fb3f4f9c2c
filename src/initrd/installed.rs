//! A guest from what a host's packages have installed: a kernel, its modules, busybox.
//!
//! Invariant: the kernel and the initramfs of a guest are of one version; both change
//! with one rename of a link.

use std::cmp::Ordering;
use std::error;
use std::fmt;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::{pack, Packed, Recipe};
use crate::trusted_path::{Destination, Kind as PathKind, TrustedPath};

/// Where a package puts the guest.
pub const GUEST: &str = "/var/lib/vmcache/guest";
/// Name of the kernel below it.
pub const KERNEL: &str = "vmlinuz";
/// Name of the initramfs.
pub const INITRAMFS: &str = "initramfs.img";
/// Where a static busybox is installed.
const BUSYBOXES: [&str; 4] =
    ["/bin/busybox", "/usr/bin/busybox", "/sbin/busybox", "/usr/local/bin/busybox"];
/// What Debian and others call kernels for virtual machines: smaller, quicker to boot.
const FOR_GUESTS: [&str; 3] = ["cloud", "kvm", "virt"];

/// A kernel and its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
}

/// Why there is no guest.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// No kernel with its modules.
    NoKernel { root: PathBuf },
    /// No busybox.
    NoBusybox,
    /// It could not be packed.
    Pack(super::Error),
    /// A file could not be put into its place.
    Place { path: PathBuf, source: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoKernel { root } => write!(
                f,
                "no kernel below {} whose modules are there, too: install one \
                 (Debian: linux-image-cloud-amd64; Fedora: kernel-core), or name one with \
                 --kernel and --kernel-modules",
                root.display()
            ),
            Error::NoBusybox => write!(
                f,
                "no busybox at {}: install a static one (Debian: busybox-static; Fedora: \
                 busybox), or name one with --userland",
                BUSYBOXES.join(", ")
            ),
            Error::Pack(_) => f.write_str("make the initramfs"),
            Error::Place { path, .. } => write!(f, "put the guest into {}", path.display()),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Pack(e) => Some(e),
            Error::Place { source, .. } => Some(source),
            Error::NoKernel { .. } | Error::NoBusybox => None,
        }
    }
}

/// The kernel that is best for a guest: one for virtual machines before others, the
/// newest of each.
///
/// # Errors
/// When there is none.
pub fn kernel(root: &Path) -> Result<Kernel, Error> {
    let mut all = Vec::new();
    for modules in ["usr/lib/modules", "lib/modules"] {
        for entry in fs::read_dir(root.join(modules)).into_iter().flatten().flatten() {
            let version = entry.file_name().to_string_lossy().into_owned();
            let images =
                [root.join(format!("boot/vmlinuz-{version}")), entry.path().join("vmlinuz")];
            let image = images.into_iter().find(|i| i.is_file());
            if let (Some(image), true) = (image, entry.path().join("kernel").is_dir()) {
                all.push((version, Kernel { image, modules: entry.path() }));
            }
        }
    }
    let for_guests = |version: &str| FOR_GUESTS.iter().any(|f| version.contains(f));
    all.sort_by(|(a, _), (b, _)| for_guests(a).cmp(&for_guests(b)).then(compare(a, b)));
    let best = all.pop().map(|(_, kernel)| kernel);
    best.ok_or_else(|| Error::NoKernel { root: root.into() })
}

/// Versions by their numbers, and else by their letters.
fn compare(a: &str, b: &str) -> Ordering {
    let parts = |v: &str| -> Vec<Result<u64, String>> {
        v.split(['.', '-', '_', '+', '~'])
            .map(|p| p.parse().map_err(|_| p.to_string()))
            .collect::<Vec<Result<u64, String>>>()
    };
    for (a, b) in parts(a).iter().zip(&parts(b)) {
        let order = match (a, b) {
            (Ok(a), Ok(b)) => a.cmp(b),
            (Err(a), Err(b)) => a.cmp(b),
            (Ok(_), Err(_)) => Ordering::Greater,
            (Err(_), Ok(_)) => Ordering::Less,
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    a.len().cmp(&b.len())
}

/// The first busybox that is installed.
///
/// # Errors
/// When there is none.
pub fn busybox() -> Result<PathBuf, Error> {
    BUSYBOXES.iter().map(PathBuf::from).find(|p| p.is_file()).ok_or(Error::NoBusybox)
}

/// Makes the guest in a directory of its own, and has `place` name it from now on.
///
/// # Errors
/// [`Error`]; the guest before then stands.
pub fn build(
    kernel: &Kernel,
    agent: &Path,
    userland: &Path,
    extra_modules: &[String],
    place: &Path,
) -> Result<Packed, Error> {
    let failed = |source| Error::Place { path: place.into(), source };
    let (parent, name) = match (place.parent(), place.file_name()) {
        (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => (parent, name),
        _ => return Err(failed(io::Error::other("it must be an absolute path below another"))),
    };
    let above = TrustedPath::make_directory(parent, 0o755, PathKind::SharedDirectory);
    let above = above.map_err(failed)?;
    Destination::of(place).and_then(|place| place.check_owner()).map_err(failed)?;
    // One at a time; whoever comes second has the last word.
    let lock = above.open().map_err(failed)?;
    let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| failed(e.into()))?;
    let dir = parent.join(format!("{}.{}", name.to_string_lossy(), std::process::id()));
    let before = fs::read_link(place).ok().map(|old| parent.join(old));
    let made = || -> Result<Packed, Error> {
        DirBuilder::new().create(&dir).map_err(failed)?;
        // Whatever the umask.
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).map_err(failed)?;
        let image = dir.join(KERNEL);
        fs::copy(&kernel.image, &image).map_err(failed)?;
        let output = dir.join(INITRAMFS);
        let recipe = Recipe {
            agent: agent.into(),
            kernel_modules: kernel.modules.clone(),
            userland: Some(userland.into()),
            extra_modules: extra_modules.to_vec(),
            output: output.clone(),
        };
        let packed = pack(&recipe).map_err(Error::Pack)?;
        for file in [&image, &output] {
            // Any user's QEMU reads them; a distribution's kernel may be root's alone.
            fs::set_permissions(file, Permissions::from_mode(0o644)).map_err(failed)?;
        }
        swing(&dir, parent, name).map_err(failed)?;
        Ok(packed)
    };
    let packed = made().inspect_err(|_| drop(fs::remove_dir_all(&dir)))?;
    // The one before: QEMUs that run have its files open.
    if let Some(before) = before.filter(|old| is_ours(old, parent, name)) {
        let _ = fs::remove_dir_all(before);
    }
    drop(lock);
    Ok(packed)
}

/// Whether a directory is one that was made here: of its name, beside it, with nothing
/// else in it.
fn is_ours(dir: &Path, parent: &Path, name: &std::ffi::OsStr) -> bool {
    let number = dir
        .file_name()
        .and_then(|n| n.to_str()?.strip_prefix(&format!("{}.", name.to_str()?)))
        .is_some_and(|n| n.parse::<u32>().is_ok());
    let known = |n: &std::ffi::OsString| n == KERNEL || n == INITRAMFS;
    let files = fs::read_dir(dir).map(|all| all.flatten().all(|f| known(&f.file_name())));
    number && dir.parent() == Some(parent) && files.unwrap_or(false)
}

/// The link's new target, at once.
fn swing(dir: &Path, parent: &Path, name: &std::ffi::OsStr) -> io::Result<()> {
    let target = dir.file_name().map(PathBuf::from).unwrap_or_default();
    let place = parent.join(name);
    if fs::symlink_metadata(&place).is_ok_and(|m| m.is_dir()) {
        return Err(io::Error::other("it is a directory: name another place, or remove it"));
    }
    let new = dir.with_extension("link");
    let _ = fs::remove_file(&new);
    symlink(&target, &new)?;
    fs::rename(&new, &place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_kernel_for_guests_is_taken() {
        let root = std::env::temp_dir().join(format!("vmcache-kernels-{}", std::process::id()));
        assert!(kernel(&root).unwrap_err().to_string().contains("linux-image-cloud-amd64"));
        for version in ["6.1.0-9-cloud-amd64", "6.1.0-48-cloud-amd64", "6.12.1-amd64", "7-cloud"] {
            fs::create_dir_all(root.join("lib/modules").join(version).join("kernel")).unwrap();
            fs::create_dir_all(root.join("boot")).unwrap();
            // One whose image is gone.
            if version != "7-cloud" {
                fs::write(root.join(format!("boot/vmlinuz-{version}")), "").unwrap();
            }
        }
        let found = kernel(&root).unwrap();
        assert_eq!(found.image, root.join("boot/vmlinuz-6.1.0-48-cloud-amd64"));
        // Fedora's place.
        fs::write(root.join("lib/modules/7-cloud/vmlinuz"), "").unwrap();
        assert_eq!(kernel(&root).unwrap().image, root.join("lib/modules/7-cloud/vmlinuz"));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn only_what_was_made_here_is_removed() {
        let root = std::env::temp_dir().join(format!("vmcache-guests-{}", std::process::id()));
        let name = std::ffi::OsStr::new("guest");
        for (dir, file, ours) in [
            ("guest.12", KERNEL, true),
            ("guest.bak", KERNEL, false),
            ("guest.13", "precious", false),
            ("other.12", KERNEL, false),
        ] {
            fs::create_dir_all(root.join(dir)).unwrap();
            fs::write(root.join(dir).join(file), "").unwrap();
            assert_eq!(is_ours(&root.join(dir), &root, name), ours, "{dir}");
        }
        assert!(!is_ours(&root.join("guest.12"), Path::new("/elsewhere"), name));
        fs::remove_dir_all(root).unwrap();
    }
}
