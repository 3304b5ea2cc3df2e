#!/bin/busybox sh
# Process 1 of the lab's guest. Its second partition keeps: boots (a number), and records, one line each:
# sequence number, md5 of "record NUMBER". What it has to say goes to the serial console in lines that begin with GUEST.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/order); do insmod "/modules/$module" 2>/dev/null; done
say() { echo "GUEST $*" >/dev/ttyS0; }
digest() { echo "record $1" | md5sum | cut -d' ' -f1; }

tries=0 # the disk appears a moment after its driver
while [ ! -b /dev/vda2 ] && [ $tries -lt 100 ]; do tries=$((tries + 1)); sleep 0.1; done
mount -t ext4 -o noatime /dev/vda2 /mnt || say "mount failed"
cd /mnt || exit 1

boots=$(($(cat boots 2>/dev/null || echo 0) + 1))
echo $boots >boots
# Every line must carry the number after the one before it; the newest line must carry its own checksum as well.
newest=$(tail -n 1 records 2>/dev/null)
last=${newest%% *}
gaps=$(awk '$1 != NR || length($2) != 32 {n++} END {print n + 0}' records 2>/dev/null || echo 0)
[ -z "$last" ] && last=0
[ "$last" = 0 ] || [ "${newest#* }" = "$(digest "$last")" ] || gaps=$((gaps + 1))
sync
say "boots=$boots last=$last broken=$gaps base=$(md5sum base.bin | cut -c1-12)"
for disk in /sys/block/vd[b-z]; do # every other disk: its serial, its size in bytes, and the md5 of its first MiB
	[ -d "$disk" ] || continue
	first=$(dd "if=/dev/${disk##*/}" bs=1M count=1 2>/dev/null | md5sum | cut -c1-12)
	say "disk ${disk##*/} serial=$(cat "$disk/serial") size=$(($(cat "$disk/size") * 512)) first=$first"
done

cat >/etc/dhcp <<'X'
#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
echo "GUEST net $interface mac=$(cat "/sys/class/net/$interface/address") ip=$ip" >/dev/ttyS0
X
chmod 755 /etc/dhcp
for place in /sys/class/net/eth*; do # every network interface: its MAC address, and again with what a DHCP server gives it
	[ -d "$place" ] || continue
	say "net ${place##*/} mac=$(cat "$place/address")"
	ip link set "${place##*/}" up
	udhcpc -i "${place##*/}" -s /etc/dhcp -n -q -t 4 -T 3 >/dev/null 2>&1 &
done

nc -ll -p 80 -e true >/dev/null 2>&1 & # something that answers

mkdir -p /etc/acpi/PWRF # the folder that acpid looks into when the power button is pressed
cat >/etc/acpi/PWRF/00000080 <<'X'
#!/bin/busybox sh
kill "$(cat /writer)" $(cat /rewriter 2>/dev/null)
cd /
sync
echo "GUEST powers off after record $(tail -n 1 /mnt/records | cut -d' ' -f1)" >/dev/ttyS0
umount /mnt
poweroff -f
X
chmod 755 /etc/acpi/PWRF/00000080

(
	while :; do
		last=$((last + 1))
		echo "$last $(digest $last)" | dd of=records oflag=append conv=notrunc,fsync 2>/dev/null
		[ $((last % 20)) = 0 ] && say "wrote=$last"
		sleep 0.2
	done
) &
echo $! >/writer
# So many MiB of the disk, from its 140th on, are rewritten again and again where its 130th begins with "rewrite NUMBER".
set -- $(dd if=/dev/vda bs=1M skip=130 count=1 2>/dev/null | head -c 32 | tr -dc 'a-z0-9 ')
if [ "$1" = rewrite ]; then
	while :; do
		dd if=base.bin of=/dev/vda bs=1M skip=$((turn % 8)) seek=$((140 + turn % $2)) count=1 conv=notrunc,fsync 2>/dev/null
		turn=$((turn + 1))
		sleep 0.2
	done &
	echo $! >/rewriter
fi
exec acpid -d >/dev/null 2>&1
