//! Which paths a configuration names, as what each is wanted, and whether all of them are root's
//! and this process's user's alone ([`crate::trusted_path`]).
//!
//! Invariant: every option that names a path is here or is read by a module that checks it (the
//! files of the configuration itself, `served_config`); a test holds the table of options
//! against both.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::logging::{LogTo, DEV_LOG};
use super::options::{FACTORY, OURS, PROXY, QEMU};
use super::{Config, Error, Transport};
use crate::agent::Kind as AgentKind;
use crate::confine::cgroup;
use crate::trusted_path::{
    check_existing, check_provided, refused, Destination, Kind, TrustedPath,
};

/// Sources of random numbers that are the kernel's own, whoever a container has given the names
/// of them to.
const KERNELS_RANDOM: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/hwrng"];
/// What the name of a server's lock ends with, after its socket's.
pub const SOCKET_LOCK: &str = ".lock";
/// What the name of a server's socket ends with until it is put in its place.
pub const SOCKET_NEW: &str = ".n";
/// Bytes of an image by which its kind is known.
const HEAD: u64 = 1024;
/// What an initramfs begins with: a cpio archive, or what it may be compressed by.
const ARCHIVES: [&[u8]; 8] = [
    b"070701",
    b"070702",
    b"\x1f\x8b",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
    b"BZh",
    b"\x5d\x00\x00",
];

/// An option that names a path, and the path.
type Named = (&'static str, &'static str, PathBuf);

impl Config {
    /// Checks that the programs and files that VMs are made from exist, are what they should be,
    /// and that nobody else can change them, nor any other path that the configuration names.
    ///
    /// # Errors
    /// [`Error::File`] for the first that is not.
    pub fn check_files(&self) -> Result<(), Error> {
        self.check_parts()?;
        self.check_places()
    }

    /// The same, of the programs and files that VMs are made from alone.
    ///
    /// # Errors
    /// [`Error::File`] for the first that is not.
    pub fn check_parts(&self) -> Result<(), Error> {
        self.check_programs()?;
        self.check_images()
    }

    /// An error about a path; `remedy` where the path itself is not the matter.
    fn unusable(&self, (table, key, path): &Named, e: &io::Error, remedy: &str) -> Error {
        let why = match refused(e) {
            Some(untrusted) => untrusted.to_string(),
            None if path.as_os_str().is_empty() => format!("is not set; {remedy}"),
            None => format!("{e}; {remedy}"),
        };
        self.bad_file(table, key, path, why)
    }

    fn bad_file(&self, table: &str, key: &'static str, path: &Path, why: String) -> Error {
        Error::File { place: self.place(table, key), key, path: path.to_path_buf(), why }
    }

    fn named(&self, table: &'static str, key: &'static str) -> Named {
        (table, key, self.text(table, key).into())
    }

    fn check_programs(&self) -> Result<(), Error> {
        let mut programs = vec![(
            self.named(QEMU, "path"),
            "install QEMU (Debian: qemu-system-x86) or set its path",
        )];
        if self.shares_virtiofs() {
            programs.push((
                self.named(QEMU, "virtio_fs_daemon"),
                "install virtiofsd (Debian: qemu-system-common has /usr/lib/qemu/virtiofsd), or \
                 set shared_fs = \"none\"",
            ));
        }
        if self.agent_kind == AgentKind::Kata1 && !self.text(PROXY, "path").is_empty() {
            programs.push((self.named(PROXY, "path"), "leave it out for vmcache's own"));
        }
        if self.transport() == Transport::VhostUserVsock && self.vsock_sockets().is_none() {
            let remedy = "install it, or choose another transport";
            programs.push((self.named(OURS, "vsock_device"), remedy));
        }
        for (named, remedy) in programs {
            let checked = TrustedPath::program(&named.2);
            checked.map_err(|e| self.unusable(&named, &e, remedy))?;
        }
        Ok(())
    }

    fn check_images(&self) -> Result<(), Error> {
        let named = self.named(QEMU, "kernel");
        let remedy = "name the guest's kernel";
        let head = first_bytes(&named.2).map_err(|e| self.unusable(&named, &e, remedy))?;
        if head.get(0x202..0x206) != Some(b"HdrS") && !head.starts_with(b"\x7fELF") {
            let why = "is no Linux kernel (neither bzImage nor ELF)".to_string();
            return Err(self.bad_file(QEMU, "kernel", &named.2, why));
        }
        let named = self.named(QEMU, "initrd");
        let remedy = "`vmcache mkinitrd` makes one";
        let head = first_bytes(&named.2).map_err(|e| self.unusable(&named, &e, remedy))?;
        if !ARCHIVES.iter().any(|magic| head.starts_with(magic)) {
            let why = format!("is no initramfs (no cpio archive, compressed or not); {remedy}");
            return Err(self.bad_file(QEMU, "initrd", &named.2, why));
        }
        let named = self.named(QEMU, "firmware");
        if !named.2.as_os_str().is_empty() {
            let remedy = "leave it out for QEMU's own";
            TrustedPath::file(&named.2).map_err(|e| self.unusable(&named, &e, remedy))?;
        }
        Ok(())
    }

    /// Checks the directories, sockets and devices that it names, as far as they exist.
    ///
    /// # Errors
    /// [`Error::File`] for the first that others can change.
    pub fn check_places(&self) -> Result<(), Error> {
        let refuse = |named: &Named, e: io::Error| match refused(&e) {
            Some(why) => Err(self.bad_file(named.0, named.1, &named.2, why.to_string())),
            // It is missing, or this user cannot look: whoever uses it will tell.
            None => Ok(()),
        };
        for (named, kind) in self.made() {
            if let Err(e) = check_existing(&named.2, kind) {
                refuse(&named, e)?;
            }
        }
        for (named, kind) in self.provided() {
            if let Err(e) = check_provided(&named.2, kind) {
                refuse(&named, e)?;
            }
        }
        let named = (FACTORY, "vm_cache_endpoint", self.endpoint());
        if let Err(e) = endpoint(&named.2) {
            refuse(&named, e)?;
        }
        let named = self.named(OURS, "cgroup");
        if let Err(e) = cgroup::check(self) {
            refuse(&named, e)?;
        }
        Ok(())
    }

    /// Directories that a server makes where they are missing, and as what each is wanted.
    fn made(&self) -> Vec<(Named, Kind)> {
        let mut all = vec![(self.named(OURS, "vm_store_path"), Kind::SharedDirectory)];
        if self.flag(FACTORY, "enable_template") {
            all.push((self.named(FACTORY, "template_path"), Kind::Directory));
        }
        all
    }

    /// Directories, sockets and devices that others make, and as what each is wanted.
    fn provided(&self) -> Vec<(Named, Kind)> {
        let mut all = Vec::new();
        let source = self.text(QEMU, "entropy_source");
        if !source.is_empty() && !KERNELS_RANDOM.contains(&source) {
            all.push((self.named(QEMU, "entropy_source"), Kind::Source));
        }
        if !self.text(QEMU, "file_mem_backend").is_empty() {
            all.push((self.named(QEMU, "file_mem_backend"), Kind::SharedDirectory));
        }
        if let Some((qemus, hosts)) = self.vsock_sockets() {
            all.extend([qemus, hosts].map(|p| ((OURS, "vsock_sockets", p), Kind::Socket)));
        }
        let may_open = self.list(OURS, "confine_paths").into_iter();
        all.extend(may_open.map(|path| ((OURS, "confine_paths", path.into()), Kind::Any)));
        if let LogTo::Unix(path) = &self.logging.to {
            if path != Path::new(DEV_LOG) {
                all.push(((OURS, "log", path.clone()), Kind::Socket));
            }
        }
        all
    }

    /// The same, of the log's socket alone, if it is one: before anything is logged.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn check_log(&self) -> Result<(), Error> {
        let log = self.provided().into_iter().filter(|(named, _)| named.1 == "log");
        for (named, kind) in log {
            if let Err(Some(why)) = check_provided(&named.2, kind).as_ref().map_err(refused) {
                return Err(self.bad_file(named.0, named.1, &named.2, why.to_string()));
            }
        }
        Ok(())
    }
}

/// Where a server's socket is to be, when what is there, and beside it, is root's and this user's.
///
/// # Errors
/// [`crate::trusted_path::Untrusted`] inside of an [`io::Error`]; as open(2).
pub fn endpoint(path: &Path) -> io::Result<Destination> {
    let place = Destination::of(path)?;
    place.check_owner()?;
    place.check_no_link()?;
    place.with(SOCKET_NEW)?.check_owner()?;
    place.with(SOCKET_LOCK)?.check_file()?;
    Ok(place)
}

fn first_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    TrustedPath::file(path)?.open()?.take(HEAD).read_to_end(&mut head)?;
    Ok(head)
}
