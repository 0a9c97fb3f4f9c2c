//! Faults of guests and of what serves them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::count::attendants;
use crate::daemon::{for_all_users, text, vmcache, wait_for};
use crate::field::{Dice, Field, Row};
use crate::rows::{ms, send};

/// What carries a guest's vsock dies: the VM is of no use, and is replaced.
pub fn vsock_devices(prepared: &Path, times: u32) -> Row {
    let mut field = Field::new(prepared, 2, |options, _| {
        // Each has memory of its own, which that process shares.
        options.more_factory = String::new();
        options.more_ours += &format!(
            "transport = \"vhost-user-vsock\"\nvsock_device = {:?}\n",
            for_all_users(&prepared.join("bin/vhost-device-vsock"))
        );
    });
    let mut dice = Dice::new();
    for n in 0..times {
        let all = attendants(&field.daemon().store());
        if let Some(pid) = all.get(dice.below(all.len() as u64) as usize) {
            send(i64::from(*pid), Signal::SIGKILL);
        }
        dice.pause(ms(5000));
        if n % 3 == 0 {
            if let Some((id, _)) = field.claim("60") {
                let echo = field.daemon().output(&["exec", &id, "--", "true"]);
                field.row.dead += usize::from(!echo.status.success());
                field.stop(&id);
            }
        }
    }
    field.settle()
}

/// A file of a cpio archive, and the archive's end.
fn cpio(files: &[(&str, u32, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (n, (name, mode, data)) in files.iter().chain([&("TRAILER!!!", 0, "")]).enumerate() {
        let numbers = [n as u32 + 900, *mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0];
        let name_size = name.len() as u32 + 1;
        out.extend(b"070701");
        for number in numbers.into_iter().chain([name_size, 0]) {
            out.extend(format!("{number:08x}").bytes());
        }
        out.extend(name.bytes().chain([0]));
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(data.bytes());
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// A guest whose init is busybox's: a real system, which says to whoever asks for its
/// agent what this command says.
fn guest(prepared: &Path, dir: &Path, name: &str, says: &str) -> PathBuf {
    let image = dir.join(name);
    let mut modules = fs::read_dir(prepared.join("kernel/lib/modules")).unwrap();
    let out = vmcache(&prepared.join("configuration.toml"))
        .args(["mkinitrd", "--agent", "/bin/busybox", "--userland", "/bin/busybox"])
        .arg("--kernel-modules")
        .arg(modules.next().unwrap().unwrap().path())
        .arg("--output")
        .arg(&image)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let script = format!(
        "export PATH=/bin:/sbin\nmount -t proc proc /proc\nmount -t devtmpfs devtmpfs /dev\n\
         for m in $(cat /lib/modules/vmcache.list); do insmod $m; done\nsleep 1\n\
         for p in /dev/vport*; do (while :; do {says} >$p; sleep 1; done) & done\n"
    );
    let files = [
        ("etc", 0o040_755, ""),
        ("etc/inittab", 0o100_644, "::sysinit:/bin/sh /says\n::respawn:/bin/sleep 1000\n"),
        ("says", 0o100_755, script.as_str()),
    ];
    let mut file = fs::OpenOptions::new().append(true).open(&image).unwrap();
    file.write_all(&cpio(&files)).unwrap();
    image
}

/// Agents that say nothing, nonsense, or nonsense without an end: their VMs are ended
/// at the deadline, and none is handed out.
pub fn agents(prepared: &Path, times: u32) -> Row {
    let mut images = Vec::new();
    let mut good = PathBuf::new();
    let mut field = Field::new(prepared, 1, |options, dir| {
        options.more_factory = String::new();
        // Under a translator, on a busy machine, a good one takes a few seconds.
        options.timeout = 15;
        good = dir.join("good");
        fs::copy(&options.initrd, &good).unwrap();
        images = vec![
            guest(prepared, dir, "silent", ":"),
            guest(prepared, dir, "garbled", "head -c 200000 /dev/urandom"),
            guest(prepared, dir, "endless", "cat /dev/urandom"),
        ];
        let place = dir.join("initrd");
        fs::copy(&good, &place).unwrap();
        options.initrd = place.display().to_string();
    });
    let place = PathBuf::from(&field.options.initrd);
    // Another file under the same name: that is what clients compare.
    let to = |image: &Path| {
        let new = place.with_extension("new");
        fs::copy(image, &new).unwrap();
        fs::rename(&new, &place).unwrap();
    };
    for n in 0..times as usize {
        to(&images[n % images.len()]);
        let failed = field.daemon().log_lines("boot-failed").len();
        // The good one that stands ready; what comes after it is not.
        if let Some((id, _)) = field.claim("30") {
            field.stop(&id);
        }
        if field.claim("3").is_some() {
            field.row.dead += 1;
        }
        wait_for("a boot that fails", || field.daemon().log_lines("boot-failed").len() > failed);
        to(&good);
        field.daemon().wait_ready(1);
    }
    field.settle()
}
