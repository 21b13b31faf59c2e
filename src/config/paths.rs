//! Every path under `/etc`, `/var` and `/run` that the appliance knows by itself.

pub const CONFIG_FILE: &str = "/etc/dealscale/dealscale.toml";
pub const STATE_DIR: &str = "/var/lib/dealscale";
pub const ADMIN_SOCKET: &str = "/run/dealscale/admin.sock";

/// Where systemd looks for units, the strongest first (systemd.unit(5)); the last two are one folder on a merged-/usr system.
pub const SYSTEMD_DIRS: [&str; 4] =
    ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];
