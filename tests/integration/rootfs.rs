//! A Debian made by debootstrap, as a directory and as a tar.

use std::process::Command;

use crate::daemon::{assert_nothing_left, text, Daemon, Options};
use crate::require_qemu;

#[test]
fn a_debian_root_runs_as_directory_and_as_tar() {
    let prepared = require_qemu!();
    let (directory, tar) = (prepared.join("debian"), prepared.join("debian.tar"));
    let mut options = Options::pool(&prepared, 1);
    options.memory = 1024;
    let d = Daemon::start(&options);
    let packages = std::fs::read_to_string(directory.join("var/lib/dpkg/status"))
        .expect("tests/run makes a Debian root with debootstrap");
    let expected = packages.lines().filter(|l| l.starts_with("Package: ")).count();
    for root in [&directory, &tar] {
        let root = root.to_str().unwrap();
        let script = "dpkg -l | grep -c ^ii; perl -e 'print 6*7, qq(\\n)'; \
                      stat -c '%a %U' /usr/bin/passwd; readlink /bin; \
                      test \"$(stat -c %i /usr/bin/perl)\" = \"$(stat -c %i /usr/bin/perl5.36.0)\" \
                      && echo linked; cat /proc/1/comm > /dev/null && ls /dev/pts/ptmx; \
                      cp /usr/bin/id /suid; chmod 4755 /suid; \
                      setpriv --reuid 1000 --regid 1000 --clear-groups /suid -u; \
                      mknod /null c 1 3 && echo x > /null && echo device; \
                      getent hosts $(hostname) | wc -l; stat -c %Y /etc/debian_version";
        let out =
            d.output(&["run", "--rootfs", root, "--env", "LC_ALL=C", "--", "sh", "-c", script]);
        let lines = text(&out.stdout);
        let lines: Vec<&str> = lines.lines().collect();
        let expected = expected.to_string();
        let changed = std::fs::metadata(directory.join("etc/debian_version")).unwrap();
        let changed = std::os::unix::fs::MetadataExt::mtime(&changed).to_string();
        let want = [expected.as_str(), "42", "4755 root", "usr/bin", "linked", "/dev/pts/ptmx"];
        // Set-uid programs, devices, this guest's name, times: as in a container of runc's.
        let want: Vec<&str> = want.into_iter().chain(["0", "device", "1", &changed]).collect();
        assert_eq!(lines, want, "{root}: {}", text(&out.stderr));
        d.wait_ready(1);
    }
    // The root itself is as it was, too.
    let small = d.dir.0.join("small");
    let made = "mkdir -p small/bin small/etc small/image; cp $(command -v busybox) small/bin/; \
                cp small/bin/busybox small/bin/chown; touch small/mine; \
                printf 'a:x:5\\nann:x:70:71::/home/a:\\n\\377:x:1:1::/:\\nann:x:1:1::/:\\n' > small/etc/passwd; \
                printf 'g:x:90:ann\\n\\n80\\nh:x:91:b,ann\\n' > small/etc/group; \
                chmod 711 small; chown 7:8 small";
    let made = Command::new("sh").args(["-ec", made]).current_dir(&d.dir.0).status().unwrap();
    assert!(made.success());
    let capability = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(small.join("bin/chown"), "security.capability", &capability).unwrap();
    let made = "tar --xattrs --xattrs-include='*' -C small -cf small.tar .; zstd -q small.tar; \
                xz -k small.tar; gzip -k small.tar; \
                echo [] > manifest.json; tar -cf saved.tar manifest.json small.tar";
    let made = Command::new("sh").args(["-ec", made]).current_dir(&d.dir.0).status().unwrap();
    assert!(made.success());
    // By its own passwd and group, with lines that are none; capabilities of a file's.
    for ending in ["tar", "tar.zst", "tar.xz", "tar.gz"] {
        d.wait_ready(1);
        let root = small.with_extension(ending);
        let script = "busybox id; /bin/chown 70 /mine && busybox stat -c %u /mine";
        let run = ["run", "-u", "ann", "--rootfs", root.to_str().unwrap(), "-e", "PATH=/bin", "--"];
        let out = d.ok(&[&run[..], &["/bin/busybox", "sh", "-c", script]].concat());
        assert_eq!(out, "uid=70(ann) gid=71 groups=71,90(g),91(h)\n70\n", "{ending}");
    }
    // Layers are no root.
    let saved = d.dir.0.join("saved.tar");
    let out = d.output(&["run", "--rootfs", saved.to_str().unwrap(), "--", "true"]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(125) && err.contains("docker export"), "{err}");
    for root in [small.clone(), small.with_extension("tar")] {
        d.wait_ready(1);
        let command = ["/bin/busybox", "stat", "-c", "%a %u:%g", "/"];
        let run = ["run", "--rootfs", root.to_str().unwrap(), "--"];
        assert_eq!(d.ok(&[&run[..], &command].concat()), "711 7:8\n", "{root:?}");
    }
    let out = d.output(&["run", "--rootfs", "/nonexistent", "--", "true"]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
    let out = d.output(&["run", "--rootfs", "/etc/passwd", "--", "true"]);
    assert_eq!(out.status.code(), Some(125), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("tar"), "{}", text(&out.stderr));
    assert_nothing_left(&d.quit().0);
}
