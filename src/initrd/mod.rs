//! Packs the guest agent, kernel modules and a userland into an initramfs.
//!
//! The result needs nothing else: the agent is its `/init`, static, and moves
//! itself out of the initramfs. The archive is plain (no compression: reading
//! it from the page cache is faster than unpacking it under TCG).

mod cpio;
pub mod installed;
mod modules;

use std::error;
use std::fmt;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::Cpio;
use modules::Modules;

use crate::trusted_path::{Destination, TrustedPath};

/// What goes into an initramfs, and where it is written.
#[derive(Debug)]
pub struct Recipe {
    /// The static `vmcache-agent`.
    pub agent: PathBuf,
    /// A kernel's module directory.
    pub kernel_modules: PathBuf,
    /// A static busybox, for a guest with a shell.
    pub userland: Option<PathBuf>,
    /// Modules beyond the usual ones.
    pub extra_modules: Vec<String>,
    /// The file to write.
    pub output: PathBuf,
}

/// What was packed.
#[derive(Debug)]
pub struct Packed {
    /// Names of the modules, in load order.
    pub modules: Vec<String>,
    /// Applets of the userland.
    pub applets: usize,
    /// Bytes written.
    pub size: u64,
}

/// Why an initramfs could not be made.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// A file or directory could not be read.
    Read { path: PathBuf, source: io::Error },
    /// The result could not be written.
    Write { path: PathBuf, source: io::Error },
    /// The directory has no kernel module at all.
    NoModules { dir: PathBuf },
    /// The kernel lacks a module that a guest needs.
    MissingModule { name: String, dir: PathBuf },
    /// A file that should be a module is none.
    NotAModule { path: PathBuf, why: String },
    /// A program for the guest is not a static executable of this machine's kind.
    NotStatic { path: PathBuf, why: String },
    /// The userland did not list its applets.
    Userland { path: PathBuf, why: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Read { path, .. } => write!(f, "read {}", path.display()),
            Error::Write { path, .. } => write!(f, "write the initramfs {}", path.display()),
            Error::NoModules { dir } => write!(
                f,
                "no kernel modules under {}: give the directory of one kernel, \
                 such as /lib/modules/$(uname -r)",
                dir.display()
            ),
            Error::MissingModule { name, dir } => write!(
                f,
                "the kernel of {} has module {name} neither as a file nor built in; \
                 a guest needs it: use a distribution's kernel for virtual machines",
                dir.display()
            ),
            Error::NotAModule { path, why } => {
                write!(f, "{} is no kernel module: {why}", path.display())
            }
            Error::NotStatic { path, why } => write!(
                f,
                "{} can not run in an initramfs: {why}; a static executable is needed",
                path.display()
            ),
            Error::Userland { path, why } => {
                write!(f, "list the applets of {}: {why}", path.display())
            }
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Read { source, .. } | Error::Write { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Makes the initramfs; the file appears whole or not at all.
///
/// # Errors
/// See [`Error`].
pub fn pack(recipe: &Recipe) -> Result<Packed, Error> {
    // First, so that what cannot be written is not made.
    let failed = |source| Error::Write { path: recipe.output.clone(), source };
    let place = Destination::named(&recipe.output).map_err(failed)?;
    let draft = place.draft().map_err(failed)?;
    let agent = read_static(&recipe.agent)?;
    let userland = recipe.userland.as_deref().map(|p| Ok((p, read_static(p)?))).transpose()?;
    let applets = match &recipe.userland {
        Some(path) => list_applets(path)?,
        None => Vec::new(),
    };
    let modules = Modules::open(&recipe.kernel_modules)?.select(&recipe.extra_modules)?;

    let mut cpio = Cpio::new(BufWriter::new(draft.file.try_clone().map_err(failed)?));
    let contents = Contents {
        agent: &agent,
        userland: userland.as_ref().map(|u| u.1.as_slice()),
        applets: &applets,
        modules: &modules,
    };
    let written = contents.write(&mut cpio).and_then(|()| {
        cpio.finish()?.flush()?;
        let size = draft.file.metadata()?.len();
        draft.commit()?;
        Ok(size)
    });
    let size = written.map_err(failed)?;
    let modules = modules.into_iter().map(|m| m.name).collect();
    Ok(Packed { modules, applets: applets.len(), size })
}

struct Contents<'a> {
    agent: &'a [u8],
    userland: Option<&'a [u8]>,
    applets: &'a [String],
    modules: &'a [modules::Module],
}

impl Contents<'_> {
    fn write(&self, cpio: &mut Cpio<impl Write>) -> io::Result<()> {
        for dir in ["dev", "proc", "sys", "run", "tmp", "root", "etc", "mnt", "var", "usr", "home"]
        {
            cpio.directory(dir, if dir == "tmp" { 0o1777 } else { 0o755 })?;
        }
        // The kernel opens the console before anything is mounted.
        cpio.character("dev/console", 0o600, 5, 1)?;
        cpio.character("dev/null", 0o666, 1, 3)?;
        cpio.file("init", 0o755, self.agent)?;
        cpio.symlink("sbin/vmcache-agent", "../init")?;
        cpio.file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        )?;
        cpio.file("etc/group", 0o644, b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")?;
        cpio.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n")?;
        if let Some(busybox) = self.userland {
            cpio.file("bin/busybox", 0o755, busybox)?;
            for applet in self.applets {
                let depth = applet.matches('/').count();
                let target = format!("{}bin/busybox", "../".repeat(depth));
                cpio.symlink(applet, &target)?;
            }
        }
        let mut list = String::new();
        for module in self.modules {
            let path = format!("lib/modules/{}.ko", module.name);
            cpio.file(&path, 0o644, &module.data)?;
            list.push_str(&format!("/{path}\n"));
        }
        cpio.file("lib/modules/vmcache.list", 0o644, list.as_bytes())
    }
}

/// A program for the guest: an ELF executable without an interpreter.
fn read_static(path: &Path) -> Result<Vec<u8>, Error> {
    use object::read::elf::{FileHeader, ProgramHeader};
    let data = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let refuse = |why: &str| Error::NotStatic { path: path.into(), why: why.into() };
    let header = object::elf::FileHeader64::<object::Endianness>::parse(data.as_slice())
        .map_err(|_| refuse("it is no 64-bit ELF file"))?;
    let endian = header.endian().map_err(|_| refuse("its byte order is not known"))?;
    let segments = header
        .program_headers(endian, data.as_slice())
        .map_err(|_| refuse("its program headers are damaged"))?;
    if segments.iter().any(|s| s.p_type(endian) == object::elf::PT_INTERP) {
        return Err(refuse("it is linked to shared libraries"));
    }
    Ok(data)
}

/// The paths, without a leading slash, that a busybox wants to be linked from.
#[allow(clippy::disallowed_methods)] // Runs to its end here; no VM's process.
fn list_applets(path: &Path) -> Result<Vec<String>, Error> {
    let failed = |why: String| Error::Userland { path: path.into(), why };
    TrustedPath::program(path).map_err(|e| failed(e.to_string()))?;
    let out = Command::new(path).arg("--list-full").output().map_err(|e| failed(e.to_string()))?;
    if !out.status.success() {
        return Err(failed(format!("{} --list-full: {}", path.display(), out.status)));
    }
    let text = String::from_utf8_lossy(&out.stdout);
    let skip = ["bin/busybox", "init", "sbin/init", "linuxrc"];
    Ok(text
        .lines()
        .map(|l| l.trim().trim_start_matches('/').to_string())
        .filter(|l| !l.is_empty() && !l.contains("..") && !skip.contains(&l.as_str()))
        .collect())
}
