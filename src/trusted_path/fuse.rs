//! File systems that a user's program answers for (FUSE): such a program can say that a file is
//! root's.
//!
//! Only whoever mounted one reaches it, unless the host allows `allow_other`; then everybody
//! does, and what counts is who mounted it.
//!
//! Source: Linux's Documentation/filesystems/fuse.rst; proc_pid_mountinfo(5).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::statfs::{fstatfs, FUSE_SUPER_MAGIC};

/// The user who mounted the file system of an fd, where that is one of these; `None` for all
/// others, and for those that the host's hypervisor answers for (virtiofs).
///
/// # Errors
/// As read(2).
pub fn mounted_by(fd: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    if fstatfs(fd)?.filesystem_type() != FUSE_SUPER_MAGIC {
        return Ok(None);
    }
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mount.and_then(|mount| user(&table, mount.trim())))
}

/// Who mounted that, by the mount table.
fn user(table: &str, mount: &str) -> Option<u32> {
    let line = table.lines().find(|line| line.split(' ').next() == Some(mount))?;
    let options = line.split(" - ").nth(1)?.split(' ').nth(2)?;
    options.split(',').find_map(|option| option.strip_prefix("user_id="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    use nix::mount::{mount, umount2, MntFlags, MsFlags};

    use super::user;
    use crate::trusted_path::{Kind, TrustedPath};
    use crate::worker::Worker;

    #[test]
    fn who_mounted_it_stands_in_the_mount_table() {
        let table = "28 1 0:25 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                     528 28 0:61 / /mnt/a\\040b rw,nosuid - fuse.sshfs eve@h:/ \
                     rw,user_id=1001,group_id=1001,allow_other\n\
                     529 28 0:62 / /mnt/v rw - virtiofs share rw\n";
        assert_eq!(user(table, "528"), Some(1001));
        assert_eq!(user(table, "529"), None);
        assert_eq!(user(table, "52"), None);
    }

    /// Answers for a file system in which there is one directory, root's, as it says. Ends when
    /// that is no longer mounted. Source: Linux's include/uapi/linux/fuse.h.
    fn serve(mut device: File) {
        const INIT: u32 = 26;
        const GETATTR: u32 = 3;
        const STATFS: u32 = 17;
        let mut request = vec![0; 64 * 1024];
        while let Ok(n) = device.read(&mut request) {
            let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
            let (opcode, unique) = (word(4), request[8..16].to_vec());
            let words = |all: &[u32]| all.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<_>>();
            let (error, body) = match opcode {
                // Version 7.31, and nothing beyond; then zeros, up to 64 bytes.
                INIT => (0, [words(&[7, 31, 0, 0, 0, 4096]), vec![0; 40]].concat()),
                // Of inode 1; its times are zeros.
                GETATTR => {
                    let attributes = words(&[0, 0, 0, 0o040_755, 2, 0, 0, 0, 4096, 0]);
                    let inode = [&1_u64.to_ne_bytes()[..], &[0; 40]].concat();
                    (0, [vec![0; 16], inode, attributes].concat())
                }
                STATFS => (0, vec![0; 80]),
                // ENOSYS.
                _ => (-38_i32, Vec::new()),
            };
            let length = (16 + body.len()) as u32;
            let head = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), &unique].concat();
            if n < 40 || device.write(&[head, body].concat()).is_err() {
                return;
            }
        }
    }

    /// A program of another user's that says that all is root's.
    #[test]
    fn a_file_system_that_another_user_answers_for_is_that_users() {
        let place = std::env::temp_dir().join(format!("vmcache-fuse-{}", std::process::id()));
        std::fs::create_dir(&place).unwrap();
        for (uid, passes) in [(233_001, false), (0, true)] {
            let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
            let options = format!(
                "fd={},rootmode=40000,user_id={uid},group_id={uid},allow_other",
                device.as_raw_fd()
            );
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(Some("eves"), &place, Some("fuse"), flags, Some(options.as_str())).unwrap();
            let server = Worker::spawn("vmc-fuse", move || serve(device)).unwrap();
            // Its path only: what is held open keeps that mounted.
            let checked = TrustedPath::of(&place, Kind::Directory).map(|t| t.path().to_path_buf());
            umount2(&place, MntFlags::MNT_DETACH).unwrap();
            server.join(Duration::from_secs(10)).unwrap();
            match checked {
                Ok(path) => assert!(passes && path == place, "of uid {uid}"),
                Err(e) => {
                    let words = "is a file system that uid 233001's program answers for";
                    assert!(!passes && e.to_string().contains(words), "{e}");
                }
            }
        }
        std::fs::remove_dir(&place).unwrap();
    }
}
