import nv
nv.SRC='src'
SRC='''#include "cuda/sm80/backward.cuh"
struct Row {{ using T = anyflash::{T};
{row}
}};
extern "C" __global__ void __launch_bounds__(32 * Row::warps, Row::blocks_per_sm) kernel(const __grid_constant__ anyflash::BackwardParams p) {{ anyflash::sm80::backward<Row>(p); }}
extern "C" __global__ void __launch_bounds__(32 * Row::warps) kernel_pre(const __grid_constant__ anyflash::BackwardParams p) {{ anyflash::sm80::backward_pre<Row>(p); }}
extern "C" __global__ void __launch_bounds__(32 * Row::warps) kernel_post(const __grid_constant__ anyflash::BackwardParams p) {{ anyflash::sm80::backward_post<Row>(p); }}
'''
import inspect
src=inspect.getsource(nv.compile).replace("src=f'''#include","src0=f'''#include").replace("    n=len(hs)","    src=SRC.format(T=T,row=row)\n    n=len(hs)")
ns=dict(vars(nv)); ns['SRC']=SRC
exec(src.replace('hs=headers()','hs=headers2()'),ns)
import glob,os
def headers2():
    out={}
    for f in glob.glob(nv.SRC+'/cuda/**/*',recursive=True):
        if os.path.isfile(f): out[os.path.relpath(f,nv.SRC)]=open(f).read()
    return out
ns['headers2']=headers2
compile=ns['compile']; report=nv.report
def C(d,Br,Bc,w,b,sw,kw,qw,qs,os,general=0): return dict(general=general,d=d,dv=d,Br=Br,Bc=Bc,warps=w,blocks_per_sm=b,s_warps=sw,kv_warps=kw,q_warps=qw,q_stages=qs,o_stages=os)
def smem(c): return 2*(2*c['Bc']*c['d']+(c['q_stages']+c['o_stages'])*c['Br']*c['d']+2*c['Br']*c['Bc'])
L=[(128,64,128,8,1,2,4,2,2,2),(128,64,128,8,1,2,4,2,2,1),(64,128,128,8,1,4,4,4,2,2),(64,64,64,4,2,2,2,2,2,2),(256,64,64,8,1,4,2,2,2,2),(256,64,64,8,1,4,2,2,2,1),(256,64,64,8,1,2,2,2,2,2)]
if __name__=='__main__':
    for c in L:
        cfg=C(*c); b,log,t=compile(cfg,arch='sm_90'); print(c,smem(cfg)//1024,f'{t:.1f}',report(log) if b else log[:600])
